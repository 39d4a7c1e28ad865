"""Queries and keys of multi-head attention by hand: their softmax is what `F.multi_head_attention_forward` returns."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchprobe.capture.attention.multi_head import projected

WIDTH, HEADS, QUERIES, KEYS, BATCH = 8, 2, 5, 4, 3

PADDING = torch.arange(KEYS) > torch.tensor([3, 2, 0])[:, None]
MASK = torch.triu(torch.ones(QUERIES, KEYS, dtype=torch.bool), 1)
MASKS = {
    "none": {},
    "padding": {"key_padding_mask": PADDING},
    "mask": {"attn_mask": MASK},
    "a mask a head": {"attn_mask": torch.randn(BATCH * HEADS, QUERIES, KEYS)},
    "both": {"attn_mask": MASK, "key_padding_mask": PADDING},
}

MODULES = {
    "plain": {},
    "no bias": {"bias": False},
    "other width": {"kdim": 6},
    "a learned key": {"add_bias_kv": True},
    "a key of zeros": {"add_zero_attn": True},
    "two added keys": {"add_bias_kv": True, "add_zero_attn": True},
}


def call(module: nn.MultiheadAttention, query: torch.Tensor, key: torch.Tensor, **masks) -> tuple[tuple, dict]:
    """Arguments of `F.multi_head_attention_forward`, as the module has them."""
    first = (query, key, key, WIDTH, HEADS, module.in_proj_weight, module.in_proj_bias, module.bias_k, module.bias_v)
    args = (*first, module.add_zero_attn, 0.0, module.out_proj.weight, module.out_proj.bias)
    weights = {f"{name}_proj_weight": getattr(module, f"{name}_proj_weight") for name in "qkv"}
    separate = module.in_proj_weight is None
    masks = {name: mask.to(query.device) for name, mask in masks.items()}
    return args, {**masks, **weights, "use_separate_proj_weight": separate}


def assert_same_weights(args: tuple, kwargs: dict) -> None:
    expected = F.multi_head_attention_forward(*args, **kwargs, need_weights=True, average_attn_weights=False)[1]
    found = projected(*args, **kwargs, need_weights=True)
    logits = found.query @ found.key.mT / math.sqrt(WIDTH // HEADS)
    weights = (logits if found.mask is None else logits + found.mask).softmax(-1)
    torch.testing.assert_close(weights, expected.reshape(weights.shape))
    assert found.added == expected.size(-1) - KEYS


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES.keys())
def test_a_batch(options, masks):
    module = nn.MultiheadAttention(WIDTH, HEADS, vdim=options.get("kdim"), **options)
    assert_same_weights(
        *call(module, torch.randn(QUERIES, BATCH, WIDTH), torch.randn(KEYS, BATCH, module.kdim), **masks)
    )


@pytest.mark.parametrize(
    "masks", [{}, {"key_padding_mask": PADDING[1]}, {"attn_mask": MASK}], ids=["none", "padding", "mask"]
)
@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES.keys())
def test_one_sequence(options, masks):
    module = nn.MultiheadAttention(WIDTH, HEADS, vdim=options.get("kdim"), **options)
    assert_same_weights(*call(module, torch.randn(QUERIES, WIDTH), torch.randn(KEYS, module.kdim), **masks))


def test_keys_that_are_given():
    module = nn.MultiheadAttention(WIDTH, HEADS, add_zero_attn=True)
    args, kwargs = call(module, torch.randn(QUERIES, BATCH, WIDTH), torch.randn(KEYS, BATCH, WIDTH))
    given = {f"static_{name}": torch.randn(BATCH * HEADS, KEYS, WIDTH // HEADS) for name in "kv"}
    assert_same_weights(args, kwargs | given)
