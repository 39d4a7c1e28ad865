"""`nn.MultiheadAttention` and the transformers made of it: seen with `need_weights` either way, and never changed."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.capture.attention.harness import assert_untouched, capture_of, hooked, record, recorded
from tests.capture.attention.reference import assert_close, per_head

WIDTH, HEADS = 8, 2


def weights_of(model: nn.MultiheadAttention, *args, **kwargs) -> torch.Tensor:
    """Per-head probabilities as the module itself returns them, in float64 and without dropout."""
    model = copy.deepcopy(model).double()
    model.dropout = 0.0
    args = [a.double() for a in args]
    kwargs = {name: m.double() if m.is_floating_point() else m for name, m in kwargs.items()}
    weights = model(*args, **kwargs, need_weights=True, average_attn_weights=False)[1].detach()
    return weights if weights.dim() == 4 else weights[None]


def entropies(weights: torch.Tensor, padded: torch.Tensor | None = None) -> list[float]:
    rows = -(weights * torch.where(weights > 0, weights, 1).log()).sum(-1)  # (batch, heads, queries)
    kept = torch.ones_like(rows[:, 0], dtype=torch.bool) if padded is None else ~padded
    return [rows[:, h][kept].mean().item() for h in range(rows.shape[1])]


def assert_entropies(seen, weights, padded=None, site: str = "root") -> None:
    rows = seen.heads[site]
    found = [head["entropy"] for head in rows]
    assert found == pytest.approx(entropies(weights, padded), abs=1e-4)


OPTIONS = [
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 6, "vdim": 5},
]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_head_is_seen(options, batch_first, need_weights):
    model = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.2, batch_first=batch_first, **options)
    q, k, v = torch.randn(3, 3, WIDTH), torch.randn(3, 3, model.kdim), torch.randn(3, 3, model.vdim)
    seen = record(model, q, k, v, need_weights=need_weights)
    assert_entropies(seen, weights_of(model, q, k, v))
    assert not seen.uncovered


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_outputs_gradients_and_random_numbers_are_bitwise_equal(options, need_weights):
    model = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.2, batch_first=True, **options)
    q, k, v = torch.randn(2, 5, WIDTH), torch.randn(2, 4, model.kdim), torch.randn(2, 4, model.vdim)
    assert_untouched(model, q, k, v, need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [False, True])
def test_an_unbatched_sequence(need_weights):
    model = nn.MultiheadAttention(WIDTH, HEADS)
    x = torch.randn(5, WIDTH)
    seen = record(model, x, x, x, need_weights=need_weights)
    assert_entropies(seen, weights_of(model, x, x, x))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("float_mask", [False, True])
def test_padded_queries_of_self_attention_are_left_out(float_mask, need_weights):
    model, x = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), torch.randn(2, 5, WIDTH)
    padded = torch.zeros(2, 5, dtype=torch.bool)
    padded[1, 3:] = True
    mask = torch.zeros(2, 5).masked_fill(padded, -math.inf) if float_mask else padded
    seen = record(model, x, x, x, key_padding_mask=mask, need_weights=need_weights)
    assert_entropies(seen, weights_of(model, x, x, x, key_padding_mask=mask), padded)
    assert seen.of("rows") == [8, 8]


@pytest.mark.parametrize("need_weights", [False, True])
def test_padded_keys_of_cross_attention_hide_no_query(need_weights):
    model = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    x, memory = torch.randn(2, 5, WIDTH), torch.randn(2, 5, WIDTH)
    padded = torch.zeros(2, 5, dtype=torch.bool)
    padded[1, 3:] = True
    seen = record(model, x, memory, memory, key_padding_mask=padded, need_weights=need_weights)
    assert_entropies(seen, weights_of(model, x, memory, memory, key_padding_mask=padded))
    assert seen.of("rows") == [10, 10]


def test_values_of_their_own_make_no_cross_attention():
    """As in DETR: positions are added to queries and keys alone."""
    model, x = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), torch.randn(2, 5, WIDTH)
    placed, padded = x + 1, torch.zeros(2, 5, dtype=torch.bool)
    padded[1, 3:] = True
    seen = record(model, placed, placed, x, key_padding_mask=padded, need_weights=False)
    assert seen.of("rows") == [8, 8]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", ["2-D bool", "2-D float", "3-D bool", "is_causal"])
def test_attention_masks(kind, need_weights):
    model, x = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), torch.randn(2, 5, WIDTH)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    if kind == "2-D float":
        mask = torch.zeros(5, 5).masked_fill(mask, -math.inf)
    elif kind == "3-D bool":
        mask = torch.stack([mask, torch.zeros_like(mask), mask, torch.eye(5) > 1])
    seen = record(model, x, x, x, attn_mask=mask, is_causal=kind == "is_causal", need_weights=need_weights)
    assert_entropies(seen, weights_of(model, x, x, x, attn_mask=mask))


def test_all_statistics_agree_with_the_dense_matrix():
    model, x = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, bias=False), torch.randn(2, 5, WIDTH)
    q, k, _ = (x @ model.in_proj_weight.T).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    expected = per_head(q @ k.transpose(-1, -2) / math.sqrt(WIDTH / HEADS))
    assert_close(record(model, x, x, x, need_weights=False).heads["root"], expected)
    assert_close(record(model, x, x, x, need_weights=True).heads["root"], expected)


class StaticKeys(nn.Module):
    """Calls the functional form with keys and values of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS)
        self.keys = nn.Parameter(torch.randn(2 * HEADS, 7, WIDTH // HEADS))

    def forward(self, x):
        a = self.attention
        options = {"static_k": self.keys, "static_v": self.keys, "need_weights": False}
        projections = (a.in_proj_weight, a.in_proj_bias, None, None, False, 0.0, a.out_proj.weight, a.out_proj.bias)
        return F.multi_head_attention_forward(x, x, x, WIDTH, HEADS, *projections, **options)[0]


def test_static_keys():
    model, x = StaticKeys(), torch.randn(5, 2, WIDTH)
    seen = record(model, x)
    q = F.linear(x, model.attention.in_proj_weight[:WIDTH], model.attention.in_proj_bias[:WIDTH])
    q = q.view(5, 2 * HEADS, -1).transpose(0, 1) / math.sqrt(WIDTH / HEADS)
    logits = (q @ model.keys.transpose(-1, -2)).view(2, HEADS, 5, 7)
    assert_close(seen.heads["root"], per_head(logits))
    assert_untouched(model, x)


def test_a_wrong_mask_raises_what_pytorch_raises():
    model, x = nn.MultiheadAttention(WIDTH, HEADS), torch.randn(5, 2, WIDTH)
    with pytest.raises(RuntimeError) as bare:
        model(x, x, x, attn_mask=torch.zeros(4, 4))
    with pytest.raises(RuntimeError) as seen:
        record(model, x, x, x, attn_mask=torch.zeros(4, 4))
    assert str(bare.value) == str(seen.value)


# ---- nn.Transformer


def test_every_attention_of_a_transformer_has_the_name_of_its_module():
    model = nn.Transformer(WIDTH, HEADS, 2, 2, 16, dropout=0.1, batch_first=True)
    seen = record(model, torch.randn(2, 5, WIDTH), torch.randn(2, 4, WIDTH))
    assert list(seen.heads) == [
        "encoder.layers.0.self_attn",
        "encoder.layers.1.self_attn",
        "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
        "decoder.layers.1.self_attn",
        "decoder.layers.1.multihead_attn",
    ]
    assert not seen.uncovered


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_transformer_in_training_is_bitwise_the_same(batch_first, norm_first):
    model = nn.Transformer(WIDTH, HEADS, 1, 1, 16, 0.1, batch_first=batch_first, norm_first=norm_first)
    assert_untouched(model, torch.randn(4, 4, WIDTH), torch.randn(4, 4, WIDTH))


def test_an_encoder_with_padding_and_a_causal_mask():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    x, padded = torch.randn(2, 5, WIDTH), torch.zeros(2, 5, dtype=torch.bool)
    padded[1, 4:] = True
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    padding = torch.zeros(2, 5).masked_fill(padded, -math.inf)
    seen = record(model, x, mask=mask, src_key_padding_mask=padding)
    weights = weights_of(model.layers[0].self_attn, x, x, x, attn_mask=mask, key_padding_mask=padding)
    assert_entropies(seen, weights, padded, "layers.0.self_attn")


# ---- with the user's own modes


class Counting(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_mode_of_the_users_sees_the_same_calls_and_attention_is_seen_too(need_weights):
    model, x = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.2, batch_first=True), torch.randn(2, 5, WIDTH)
    torch.manual_seed(3)
    with Counting() as bare:
        expected = model(x, x, x, need_weights=need_weights)
    torch.manual_seed(3)
    capture = capture_of(model)
    with hooked(model, capture), Counting() as mode:
        output = model(x, x, x, need_weights=need_weights)
    assert mode.calls == bare.calls
    assert torch.equal(output[0], expected[0])
    assert_entropies(recorded(capture), weights_of(model, x, x, x))
