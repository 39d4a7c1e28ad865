"""Attention calls as models make them, and some that they should not make."""

from __future__ import annotations

import math
from contextlib import contextmanager
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

from torchprobe.statistics.attention import Logits, QueryKey
from torchprobe.statistics.attention import rows as attention_rows

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@contextmanager
def blocks_of(size: int):
    """A context in which about so many logits are worked on at a time."""
    small = {"CPU_LOGITS_PER_THREAD": size, "LONG": min(attention_rows.LONG, 4 * size), "PRODUCT_ROWS": min(64, size)}
    with mock.patch.multiple(attention_rows, **small):
        yield


def block_sizes() -> st.SearchStrategy[int]:
    """From single rows to everything at once."""
    return st.sampled_from((1, 5, 40, 300, 2**18))


def query_key(batch=2, heads=4, key_heads=None, queries=12, keys=None, width=8, sigma=1.0, **options) -> QueryKey:
    """Random queries and keys, laid out as a model's: logits of standard deviation `sigma`."""
    keys = queries if keys is None else keys
    dtype = options.pop("dtype", torch.float32)
    generator = torch.Generator().manual_seed(options.pop("seed", 0))
    query = torch.randn(batch, queries, heads, width, generator=generator).to(dtype).transpose(1, 2)
    key = torch.randn(batch, keys, key_heads or heads, width, generator=generator).to(dtype).transpose(1, 2)
    return QueryKey(query, key, sigma / math.sqrt(width), **options)


def causal_bias(queries: int, keys: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The customary mask: the type's lowest number above the diagonal."""
    return torch.full((queries, keys), torch.finfo(dtype).min, dtype=dtype).triu(1)


@st.composite
def masks(draw: st.DrawFn, shape: tuple[int, int, int, int]) -> Tensor | None:
    """None, or a bool or float mask of a shape that broadcasts; some rows of it hide every key."""
    kind = draw(st.sampled_from(("none", "bool", "bias", "hiding")))
    if kind == "none":
        return None
    sizes = [draw(st.sampled_from((1, size))) for size in shape]
    random = torch.rand(sizes, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
    seen = random > draw(st.sampled_from((0.1, 0.5, 0.9)))
    if kind == "bool":
        mask = seen
    elif kind == "bias":
        mask = (random * 4 - 2).masked_fill(~seen, -1000.0)
    else:
        dtype = draw(st.sampled_from(DTYPES))
        hidden = draw(st.sampled_from((-math.inf, torch.finfo(dtype).min, max(torch.finfo(dtype).min, -1e9))))
        mask = random.to(dtype).masked_fill(~seen, hidden)
    return mask[0] if sizes[0] == 1 and draw(st.booleans()) else mask


@st.composite
def paddings(draw: st.DrawFn, batch: int, queries: int) -> Tensor | None:
    """None, or so many padded queries at the left or at the right of each sequence."""
    side = draw(st.sampled_from(("none", "left", "right")))
    if side == "none":
        return None
    lengths = torch.tensor(draw(st.lists(st.integers(0, queries), min_size=batch, max_size=batch)))
    padded = torch.arange(queries) < lengths[:, None]
    return padded if side == "left" else padded.flip(1)


def decaying(logits: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A score_mod and a mask_mod in one: a slope per head and sequence, and a window."""
    biased = logits - ((query - key).abs() * (head + 1) * (batch + 1)).to(logits.dtype) * 0.1
    return torch.where((query - key).abs() < 4, biased, -torch.inf)


@st.composite
def places(draw: st.DrawFn, queries: int, keys: int) -> Tensor | None:
    """None, or a key for each query, as a cache and queries in parts have it."""
    if draw(st.booleans()):
        return None
    return torch.tensor(draw(st.lists(st.integers(0, keys - 1), min_size=queries, max_size=queries)))


@st.composite
def query_keys(draw: st.DrawFn) -> QueryKey:
    batch, key_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    queries, keys = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    heads = key_heads * group
    return query_key(
        batch,
        heads,
        key_heads,
        queries,
        keys,
        width=draw(st.sampled_from((1, 4, 64))),
        sigma=draw(st.sampled_from((1.0, 5.0, 40.0))),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 999)),
        mask=draw(masks((batch, heads, queries, keys))),
        causal=draw(st.booleans()),
        padding=draw(paddings(batch, queries)),
        softcap=draw(st.sampled_from((None, None, 3.0))),
        modify=draw(st.sampled_from((None, None, decaying))),
        sinks=draw(st.sampled_from((None, None, torch.linspace(-30, 60, heads)))),
        places=draw(places(queries, keys)),
    )


@st.composite
def hand_written(draw: st.DrawFn) -> Logits:
    shape = tuple(draw(st.integers(1, most)) for most in (3, 4, 10, 12))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    logits = torch.randn(shape, generator=generator) * draw(st.sampled_from((1.0, 5.0, 40.0)))
    mask = draw(masks(shape))
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits.to(mask.dtype) + mask
    else:
        logits = logits.to(dtype)
    padding, at = draw(paddings(shape[0], shape[2])), draw(places(shape[2], shape[3]))
    kind = draw(st.sampled_from(("plain", "plain", "shift", "sinks", "both", "weights")))
    if kind == "weights":
        return Logits(logits.float().log_softmax(-1) + 0.1, padding, at, as_weights=True)
    column = torch.randn((*shape[:3], 1), generator=generator) * 5
    shift = column.to(logits.dtype) if kind in ("shift", "both") else None
    return Logits(logits, padding, at, shift, column - 1 if kind in ("sinks", "both") else None)
