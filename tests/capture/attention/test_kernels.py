"""Fused kernels of other packages, on stand-ins: operators with the same names, arguments and order."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.library import Library

from tests.capture.attention.harness import record
from tests.capture.attention.reference import assert_close, causal, logits_of, per_head

FLASH = (
    "(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, int window_size_left,"
    " int window_size_right, float softcap, Tensor? alibi_slopes, bool return_softmax)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
VARLEN = (
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q,"
    " SymInt max_seqlen_k, float dropout_p, float softmax_scale, bool causal, SymInt window_size_left=-1,"
    " SymInt window_size_right=-1, float softcap=0., Tensor? alibi_slopes=None, bool return_softmax=False,"
    " Tensor? block_table=None, Tensor? leftpad_k=None, Tensor? seqused_k=None, bool zero_tensors=False)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
XFORMERS = (
    "(Tensor query, Tensor key, Tensor value, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k,"
    " SymInt max_seqlen_q, SymInt max_seqlen_k, float p, float softmax_scale, bool is_causal, SymInt window_left,"
    " SymInt window_right, bool return_softmax, Tensor? block_tables) -> (Tensor, Tensor, Tensor)"
)


@pytest.fixture(autouse=True, scope="module")
def stand_ins() -> Iterator[None]:
    """What matters is the call; the result is the query."""
    libraries = []
    for namespace, name, schema in (
        ("flash_attn", "_flash_attn_forward", FLASH),
        ("flash_attn", "_flash_attn_varlen_forward", VARLEN),
        ("xformers_flash", "flash_fwd", XFORMERS),
    ):
        fragment = Library(namespace, "FRAGMENT")
        fragment.define(name + schema)
        outputs = schema.count("Tensor", schema.index("->"))
        fragment.impl(name, lambda q, *rest, outputs=outputs, **options: (q.clone(),) * outputs, "CPU")
        libraries.append(fragment)
    cutlass = Library("aten", "IMPL")
    cutlass.impl("_efficient_attention_forward", lambda q, *rest, **options: (q.clone(), q, q, q, 0, 0), "CPU")
    yield
    for fragment in (*libraries, cutlass):
        fragment._destroy()


class FlashFunction(torch.autograd.Function):
    """As flash_attn 2 wraps its operator."""

    @staticmethod
    def forward(ctx, q, k, v, scale, causal, window, softcap, slopes):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        options = {"causal": causal, "window_size_left": window[0], "window_size_right": window[1]}
        options |= {"softcap": softcap, "alibi_slopes": slopes, "return_softmax": False}
        return torch.ops.flash_attn._flash_attn_forward(q, k, v, 0.1, scale, **options)[0]

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None, None, None, None, None, None, None


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None
):
    return FlashFunction.apply(q, k, v, softmax_scale, causal, window_size, softcap, alibi_slopes)


class Flash(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def forward(self, *args):
        return flash_attn_func(*args, **self.options)


def tensors(queries: int = 5, keys: int = 7, heads: int = 4, key_heads: int = 2):
    """(batch, length, heads, width), and queries and keys with the heads first."""
    q = torch.randn(2, queries, heads, 8, requires_grad=True)
    k = torch.randn(2, keys, key_heads, 8)
    return q, k, q.transpose(1, 2), k.transpose(1, 2)


@pytest.mark.parametrize("lengths", [(5, 7), (6, 6)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_flash_attention_is_causal_from_the_bottom_right(is_causal, lengths):
    q, k, query, key = tensors(*lengths)
    seen = record(Flash(causal=is_causal), q, k, k)
    mask = causal(*lengths, lengths[1] - lengths[0]) if is_causal else None
    assert_close(seen.heads["root"], per_head(logits_of(query, key, mask=mask)))
    assert not seen.uncovered


@pytest.mark.parametrize(("is_causal", "window"), [(True, (2, 0)), (False, (2, 1)), (False, (-1, 1)), (False, (1, -1))])
def test_windows(is_causal, window):
    q, k, query, key = tensors(6, 6)
    offset = torch.arange(6) - torch.arange(6)[:, None]
    left, right = (w if w >= 0 else 9 for w in window)
    visible = (offset >= -left) & (offset <= right)
    seen = record(Flash(causal=is_causal, window_size=window), q, k, k)
    assert_close(seen.heads["root"], per_head(logits_of(query, key, mask=visible)))


@pytest.mark.parametrize("per_sequence", [False, True])
def test_softcap_scale_and_alibi(per_sequence):
    q, k, query, key = tensors()
    slopes = torch.rand(2, 4) if per_sequence else torch.rand(4)
    seen = record(Flash(softcap=1.5, softmax_scale=0.7, alibi_slopes=slopes), q, k, k)
    distance = (torch.arange(7) - torch.arange(5)[:, None] - 2).abs()
    logits = 1.5 * torch.tanh(logits_of(query, key, 0.7) / 1.5)
    logits = logits - slopes.view(-1, 4, 1, 1) * distance
    assert_close(seen.heads["root"], per_head(logits))


def test_packed_sequences_see_only_themselves():
    class Packed(nn.Module):
        def forward(self, q, k, starts):
            return torch.ops.flash_attn._flash_attn_varlen_forward(q, k, k, starts, starts, 5, 5, 0.0, 0.5, True)[0]

    q, k = torch.randn(10, 4, 8), torch.randn(10, 2, 8)
    starts = torch.tensor([0, 3, 8, 10], dtype=torch.int32)
    seen = record(Packed(), q, k, starts)
    of = torch.bucketize(torch.arange(10), starts[1:].long(), right=True)
    visible = causal(10, 10) & (of == of[:, None])
    logits = logits_of(q.transpose(0, 1)[None], k.transpose(0, 1)[None], 0.5, visible)
    assert_close(seen.heads["root"], per_head(logits))


def test_packed_sequences_with_other_keys_are_aligned_at_the_bottom_right_each():
    class Packed(nn.Module):
        def forward(self, q, k, starts, key_starts):
            operator = torch.ops.flash_attn._flash_attn_varlen_forward
            return operator(q, k, k, starts, key_starts, 3, 5, 0.0, 0.5, True)[0]

    q, k = torch.randn(5, 2, 8), torch.randn(9, 2, 8)
    seen = record(Packed(), q, k, torch.tensor([0, 3, 5]).int(), torch.tensor([0, 4, 9]).int())
    visible = torch.zeros(5, 9, dtype=torch.bool)
    visible[:3, :4], visible[3:, 4:] = causal(3, 4, 1), causal(2, 5, 3)
    expected = per_head(logits_of(q.transpose(0, 1)[None], k.transpose(0, 1)[None], 0.5, visible))
    for head in expected:
        del head["distance"]  # counted in packed positions
    assert_close(seen.heads["root"], expected)


class MemoryEfficient(nn.Module):
    """As `xformers.ops.memory_efficient_attention` calls PyTorch's operator."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.options = {"bias": None, "cu_seqlens_q": None, "cu_seqlens_k": None, "custom_mask_type": 0} | options

    def forward(self, q, k):
        options = {"max_seqlen_q": -1, "max_seqlen_k": -1, "dropout_p": 0.0, "compute_log_sumexp": True, "scale": None}
        operator = torch.ops.aten._efficient_attention_forward
        return operator(query=q, key=k, value=k, **options, **self.options)[0]


@pytest.mark.parametrize(("mask_type", "offset"), [(0, None), (1, 0), (2, 2)])
def test_xformers_cutlass_masks(mask_type, offset):
    q, k, query, key = tensors(key_heads=4)
    seen = record(MemoryEfficient(custom_mask_type=mask_type), q, k)
    mask = None if offset is None else causal(5, 7, offset)
    assert_close(seen.heads["root"], per_head(logits_of(query, key, mask=mask)))


def test_xformers_cutlass_bias_and_window():
    q, k, query, key = tensors(6, 6, key_heads=4)
    bias = torch.randn(2, 4, 6, 6)
    seen = record(MemoryEfficient(bias=bias), q, k)
    assert_close(seen.heads["root"], per_head(logits_of(query, key, mask=bias)))
    near = causal(6, 6) & ~causal(6, 6, -3)
    seen = record(MemoryEfficient(custom_mask_type=2, window_size=3), q, k)
    assert_close(seen.heads["root"], per_head(logits_of(query, key, mask=near)))


def test_xformers_flash():
    class Xformers(nn.Module):
        def forward(self, q, k):
            masks = {"window_left": -1, "window_right": -1, "return_softmax": False, "block_tables": None}
            return torch.ops.xformers_flash.flash_fwd(q, k, k, None, None, None, 5, 7, 0.0, 0.3, True, **masks)[0]

    q, k, query, key = tensors()
    assert_close(record(Xformers(), q, k).heads["root"], per_head(logits_of(query, key, 0.3, causal(5, 7, 2))))


def test_a_paged_cache_is_not_covered_and_said_so():
    class Paged(nn.Module):
        def forward(self, q, k, starts):
            operator = torch.ops.flash_attn._flash_attn_varlen_forward
            return operator(q, k, k, starts, starts, 5, 5, 0.0, 0.5, True, block_table=starts)[0]

    starts = torch.tensor([0, 5], dtype=torch.int32)
    seen = record(Paged(), torch.randn(5, 2, 8), torch.randn(5, 2, 8), starts)
    assert seen.heads == {}
    assert seen.uncovered == {"fused kernels with block_table": 1}


def test_other_operators_are_left_alone():
    class Other(nn.Module):
        def forward(self, x: Tensor):
            return torch.ops.aten.sin.default(torch.ops.aten.exp(x)) * math.pi

    seen = record(Other(), torch.ones(3))
    assert seen.heads == {}
    assert seen.uncovered == {}
