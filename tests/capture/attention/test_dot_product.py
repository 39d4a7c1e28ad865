"""`F.scaled_dot_product_attention`: exact per head, however it is called, and never changed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as imported

from tests.capture.attention.harness import assert_untouched, record
from tests.capture.attention.reference import assert_close, causal, logits_of, per_head


class Call(nn.Module):
    """Calls a function with what it is given."""

    def __init__(self, function=F.scaled_dot_product_attention, **kwargs) -> None:
        super().__init__()
        self.function = function
        self.kwargs = kwargs

    def forward(self, *args, **kwargs):
        return self.function(*args, **self.kwargs, **kwargs)


def tensors(*shape: int, key_shape: tuple[int, ...] | None = None, dtype=torch.float32):
    query = torch.randn(shape, dtype=dtype, requires_grad=True)
    key = torch.randn(key_shape or shape, dtype=dtype, requires_grad=True)
    return query, key, torch.randn(key_shape or shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(
    "function",
    [
        F.scaled_dot_product_attention,
        imported,
        torch._C._nn.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention.default,
    ],
)
def test_the_function_is_seen_however_it_was_imported(function):
    q, k, v = tensors(2, 3, 5, 4)
    seen = record(Call(function), q, k, v)
    assert_close(seen.heads["root"], per_head(logits_of(q, k)))
    assert not seen.uncovered


def test_the_output_is_the_very_tensor_that_pytorch_returned():
    q, k, v = tensors(2, 3, 5, 4)
    results = []

    def keeping(*args, **kwargs):
        results.append(F.scaled_dot_product_attention(*args, **kwargs))
        return results[-1]

    seen = record(Call(keeping), q, k, v)
    assert seen.output is results[0]
    assert torch.equal(seen.output, F.scaled_dot_product_attention(q, k, v))


def test_arguments_may_be_named():
    q, k, v = tensors(2, 3, 5, 4)
    seen = record(Call(), value=v, key=k, query=q, is_causal=True, scale=2.0)
    assert_close(seen.heads["root"], per_head(logits_of(q, k, 2.0, causal(5, 5))))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    key_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    queries=st.integers(1, 9),
    keys=st.integers(1, 9),
    kind=st.sampled_from(["none", "causal", "bool", "float"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    spread=st.sampled_from([0.3, 3.0]),
    seed=st.integers(0, 2**16),
)
def test_statistics_are_those_of_the_dense_matrix(batch, key_heads, group, queries, keys, kind, dtype, spread, seed):
    torch.manual_seed(seed)
    q = (torch.randn(batch, key_heads * group, queries, 8) * spread).to(dtype)
    k, v = (torch.randn(2, batch, key_heads, keys, 8) * spread).to(dtype)
    mask = None
    if kind == "bool":
        mask = torch.rand(batch, 1, queries, keys) > 0.3
        mask[..., 0] = True
        mask[..., 0, :] = mask[..., -1, :] = True  # every key is seen: none is padding
    elif kind == "float":
        mask = torch.randn(queries, keys).to(dtype)
    seen = record(Call(), q, k, v, mask, is_causal=kind == "causal", enable_gqa=group > 1)
    visible = causal(queries, keys) if kind == "causal" else mask
    assert_close(seen.heads["root"], per_head(logits_of(q, k, mask=visible)), 1e-4)


@pytest.mark.parametrize("shape", [(6, 4), (3, 6, 4), (2, 3, 6, 4), (2, 2, 3, 6, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_inputs_of_two_to_five_dimensions(shape, masked):
    q, k, v = tensors(*shape)
    mask = torch.randn(*shape[:-2], 6, 6) if masked else None
    four = [x.reshape(-1, *((1,) if len(shape) < 4 else x.shape[-3:-2]), *x.shape[-2:]) for x in (q, k)]
    expected = logits_of(*four)
    seen = record(Call(), q, k, v, mask)
    assert_close(seen.heads["root"], per_head(expected if mask is None else expected + mask.reshape(expected.shape)))


def test_three_dimensions_are_batch_times_heads_where_the_module_has_heads():
    q, k, v = tensors(6, 5, 4)
    model = Call()
    model.num_heads = 3
    mask = torch.randn(6, 5, 5)
    seen = record(model, q, k, v, mask)
    logits = logits_of(q.view(2, 3, 5, 4), k.view(2, 3, 5, 4)) + mask.view(2, 3, 5, 5)
    assert_close(seen.heads["root"], per_head(logits))


@pytest.mark.parametrize("shape", [(1, 1, 6, 6), (6, 6), (3, 6, 6), (2, 1, 1, 6), (1, 1), (2, 1, 1, 6, 6)])
def test_masks_broadcast_over_five_dimensions(shape):
    q, k, v = tensors(2, 2, 3, 6, 4)
    mask = torch.randn(shape)
    logits = logits_of(q.flatten(0, 1), k.flatten(0, 1)) + mask.expand(2, 2, 3, 6, 6).flatten(0, 1)
    assert_close(record(Call(), q, k, v, mask).heads["root"], per_head(logits))


def test_batches_of_one_broadcast():
    q, k, v = torch.randn(1, 3, 5, 4), torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4)
    seen = record(Call(), q, k, v)
    assert_close(seen.heads["root"], per_head(logits_of(q.expand(2, -1, -1, -1), k)))


@pytest.mark.filterwarnings("ignore:Lower right causal bias")
@pytest.mark.parametrize("lengths", [(5, 5), (3, 5), (5, 3)])
@pytest.mark.parametrize("lower_right", [False, True])
def test_causal_biases(lengths, lower_right):
    queries, keys = lengths
    q, k, v = tensors(2, 3, queries, 8, key_shape=(2, 3, keys, 8))
    bias = (causal_lower_right if lower_right else causal_upper_left)(queries, keys)
    seen = record(Call(), q, k, v, bias)
    offset = keys - queries if lower_right else 0
    assert_close(seen.heads["root"], per_head(logits_of(q, k, mask=causal(queries, keys, offset))))


def test_causal_with_more_keys_than_queries_is_aligned_at_the_top_left():
    q, k, v = tensors(2, 3, 4, 8, key_shape=(2, 3, 6, 8))
    seen = record(Call(), q, k, v, is_causal=True)
    assert_close(seen.heads["root"], per_head(logits_of(q, k, mask=causal(4, 6))))


def test_dropout_takes_its_random_numbers_and_leaves_the_statistics_alone():
    q, k, v = tensors(2, 3, 5, 4)
    model = Call(dropout_p=0.5)
    torch.manual_seed(1)
    expected, state = model(q, k, v), torch.get_rng_state()
    torch.manual_seed(1)
    seen = record(model, q, k, v)
    assert torch.equal(seen.output, expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert_close(seen.heads["root"], per_head(logits_of(q, k)))


class Projected(nn.Module):
    """Self-attention, or cross-attention where a memory is given."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(8, 8), nn.Linear(8, 16)
        self.causal = causal
        self.num_heads = 2

    def forward(self, x, memory=None, mask=None):
        q = self.q(x).unflatten(-1, (2, 4)).transpose(1, 2)
        k, v = self.kv(x if memory is None else memory).unflatten(-1, (4, 4)).transpose(1, 2).chunk(2, 1)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=0.1, is_causal=self.causal)


@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_gradients_and_random_numbers_are_bitwise_equal(autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_untouched(Projected(causal=True), torch.randn(2, 7, 8))


def test_rows_are_sampled_where_there_are_more():
    seen = record(Projected(), torch.randn(4, 64, 8), rows=32)
    assert seen.sampled == {"root": True}
    assert seen.of("rows") == [32, 32]
    exact = record(Projected(), torch.randn(4, 64, 8), rows=256)
    assert exact.sampled == {"root": False}
    assert exact.of("rows") == [256, 256]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["bool", "finfo.min", "-inf", "-10000"])
def test_padded_queries_of_self_attention_are_left_out(side, kind):
    real = torch.ones(2, 6, dtype=torch.bool)
    real[1, slice(0, 2) if side == "left" else slice(4, 6)] = False
    value = {"finfo.min": torch.finfo(torch.float32).min, "-inf": -torch.inf, "-10000": -1e4}.get(kind)
    visible = real[:, None, None, :].expand(2, 1, 6, 6)
    mask = visible if value is None else torch.zeros(visible.shape).masked_fill(~visible, value)
    model, x = Projected(), torch.randn(2, 6, 8)
    seen = record(model, x, None, mask)
    assert seen.of("rows") == [10, 10]
    shared = model.kv(x).unflatten(-1, (4, 4)).transpose(1, 2)[:, :2]
    logits = logits_of(model.q(x).unflatten(-1, (2, 4)).transpose(1, 2), shared, mask=mask)
    assert_close(seen.heads["root"], per_head(logits.masked_fill(~visible, -torch.inf), ~real))


def test_padded_keys_of_cross_attention_hide_no_query():
    mask = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    mask[1, ..., 4:] = False
    x = torch.randn(2, 6, 8)
    seen = record(Projected(), x.requires_grad_() * 1, torch.randn(2, 6, 8).requires_grad_() * 1, mask)
    assert seen.of("rows") == [12, 12]


def test_a_mask_of_the_wrong_shape_raises_what_pytorch_raises():
    q, k, v = tensors(2, 3, 5, 4)
    with pytest.raises(RuntimeError) as bare:
        Call()(q, k, v, torch.zeros(4, 4))
    with pytest.raises(RuntimeError) as seen:
        record(Call(), q, k, v, torch.zeros(4, 4))
    assert str(bare.value) == str(seen.value)
