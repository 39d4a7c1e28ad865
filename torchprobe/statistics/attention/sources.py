"""What an attention call works on, before its softmax: queries and keys, or logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Modify: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Shape(NamedTuple):
    """The sizes of an attention matrix."""

    batch: int
    heads: int
    queries: int
    keys: int


@dataclass(frozen=True)
class QueryKey:
    """Queries and keys, whose logits are computed here: scale · query · keyᵀ, softcap, modify, mask, in this order.

    query: (batch, heads, queries, width) and key: (batch, key_heads, keys, width), of any strides and of any
        floating types. Head h uses key head h // (heads // key_heads).
    mask: broadcastable to (batch, heads, queries, keys): bool, True takes part; or float, added. In a float mask
        -inf and anything at or below -5000 is a key that is not visible; milder values, such as ALiBi's slopes, are a
        bias on a visible key.
    causal: query i sees keys 0 … i (top-left aligned), besides what the mask says.
    padding: bool (batch, queries), True is a padded query, which is left out of everything.
    softcap: c in c · tanh(logit / c).
    modify: called with logits and the indices of batch, head, query and key, which broadcast to the logits;
        returns the logits to use, -inf for a key that is not visible. It must not change the logits in place.
    sinks: (heads,) a logit per head that takes probability and is no key.
    places: (queries,) int64, the index of the key at which each query stands; None: of its own index.

    Raises ValueError where the shapes do not go together.
    """

    query: Tensor
    key: Tensor
    scale: float
    mask: Tensor | None = None
    causal: bool = False
    padding: Tensor | None = None
    softcap: float | None = None
    modify: Modify | None = None
    sinks: Tensor | None = None
    places: Tensor | None = None

    def __post_init__(self) -> None:
        _check(self.query.dim() == 4, "query", self.query, "(batch, heads, queries, width)")
        batch, heads, queries, width = self.query.shape
        _check(self.key.dim() == 4, "key", self.key, "(batch, key_heads, keys, width)")
        same = self.key.size(0) == batch and self.key.size(3) == width
        _check(same, "key", self.key, f"({batch}, key_heads, keys, {width}), as the query's shape demands")
        whole = self.key.size(1) > 0 and heads % self.key.size(1) == 0
        _check(whole or not heads, "key", self.key, f"a number of key heads that divides the query's {heads}")
        if self.mask is not None:
            full, sizes = (batch, heads, queries, self.key.size(2)), self.mask.shape
            fits = len(sizes) <= 4 and all(a in (1, b) for a, b in zip(sizes[::-1], full[::-1], strict=False))
            fits = fits and (self.mask.dtype == torch.bool or self.mask.is_floating_point())
            _check(fits, "mask", self.mask, f"a bool or floating one that broadcasts to {full}")
        if self.sinks is not None:
            _check(self.sinks.shape == (heads,), "sinks", self.sinks, f"({heads},), one logit a head")
        _check_queries(self.padding, self.places, batch, queries)

    @cached_property
    def shape(self) -> Shape:
        """The sizes of the attention matrix."""
        batch, heads, queries, _ = self.query.shape
        return Shape(batch, heads, queries, self.key.size(2))

    @property
    def device(self) -> torch.device:
        """Where the statistics are computed."""
        return self.query.device

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type of the arithmetic: float32, or float64 where an input is."""
        return _arithmetic(self.query.dtype, self.key.dtype)

    @property
    def group(self) -> int:
        """How many heads share a key head."""
        return self.query.size(1) // self.key.size(1)


@dataclass(frozen=True)
class Logits:
    """Hand-written attention: the input of its softmax, scaled and masked.

    logits: (batch, heads, queries, keys), floating. -inf and anything at or below -5000 is a key that is not visible.
    padding: bool (batch, queries), True is a padded query, which is left out of everything.
    places: (queries,) int64, the index of the key at which each query stands; None: of its own index.
    shift: (batch, heads, queries, 1), what was taken off each row before, which is put on again.
    sinks: the same shape, the logarithm of what takes probability and is no key, as the logits are before the shift.
    as_weights: the logits are logarithms of weights, which are what they are: nothing makes a row's sum 1.
    masked: whether something was added to them that may be a mask, so that one of -5000 leaves others behind.

    Raises ValueError where the shapes do not go together.
    """

    logits: Tensor
    padding: Tensor | None = None
    places: Tensor | None = None
    shift: Tensor | None = None
    sinks: Tensor | None = None
    as_weights: bool = False
    masked: bool = False

    def __post_init__(self) -> None:
        fits = self.logits.dim() == 4 and self.logits.is_floating_point()
        _check(fits, "logits", self.logits, "a floating one of (batch, heads, queries, keys)")
        _check_queries(self.padding, self.places, self.logits.size(0), self.logits.size(2))
        column = (*self.logits.shape[:3], 1)
        for name, each in (("shift", self.shift), ("sinks", self.sinks)):
            if each is not None:
                _check(each.shape == column, name, each, f"{column}: one for each row of the logits")

    @cached_property
    def shape(self) -> Shape:
        """The sizes of the attention matrix."""
        return Shape(*self.logits.shape)

    @property
    def device(self) -> torch.device:
        """Where the statistics are computed."""
        return self.logits.device

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type of the arithmetic: float32, or float64 where the logits are."""
        return _arithmetic(self.logits.dtype)

    @property
    def group(self) -> int:
        """How many heads share a key head: each has its own logits."""
        return 1


Source: TypeAlias = QueryKey | Logits


def _arithmetic(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _check_queries(padding: Tensor | None, places: Tensor | None, batch: int, queries: int) -> None:
    if places is not None:
        fits = places.shape == (queries,) and places.dtype == torch.int64
        _check(fits, "places", places, f"int64 ({queries},): the index of a key for each query")
    if padding is not None:
        fits = padding.shape == (batch, queries) and padding.dtype == torch.bool
        _check(fits, "padding", padding, f"bool ({batch}, {queries}): batch, queries")


def _check(fits: bool, name: str, x: Tensor, takes: str) -> None:
    if not fits:
        raise ValueError(f"{name}: got {x.dtype} of shape {tuple(x.shape)}, takes {takes}")
