"""Where the dimensions of a tensor come from: which tokens, batch entries, heads and features its indices count.

A label says of each dimension which digits of which roots it counts: of an input (batch, tokens, width) each dimension
is a root, and of `view(batch, tokens, heads, 64)` the third counts the last one in steps of 64. Views need no table:
what they do is decoded from strides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Indices = NDArray[np.int64]
Shape = tuple[int, ...]


@dataclass(eq=False, repr=False, slots=True)
class Root:
    """Something that is counted.

    learned: features, which a product with parameters made. parts: where it was joined. under, side: the root that it
    is in the left (0) or right (1) factor of a product of two activations; fixed: which are parameters there. lost:
    what the order was lost by. written: what was written into it, at places that only the device knows. apart: whether
    parts differ in the parameters alone that made them, as heads do. picked: what it was picked of, in whichever order.
    made: the parameters that it is features of. over: whether any stands behind what was written. resized: by pools.
    """

    learned: bool = False
    parts: tuple[Part, ...] = ()
    under: Root | None = None
    side: int | None = None
    lost: str | None = None
    fixed: bool = False
    written: Written | None = None
    apart: bool = False
    picked: frozenset[Root] = frozenset()
    made: Any = None
    over: bool = False
    tables: dict[Any, dict[Root, tuple[Indices, bool]]] = field(default_factory=dict)
    kept: set[Root] | None = None
    sides: dict[tuple[int, bool], Root] = field(default_factory=dict)
    resized: dict[int, Root] = field(default_factory=dict)

    @property
    def lowest(self) -> Root:
        """What it is outside of all products."""
        return self if self.under is None else self.under.lowest

    @property
    def may_be_tokens(self) -> bool:
        """Whether it was taken for heads, as a layer summed over the rest of it: patches of a series are like them."""
        return self.learned and self.made is None and self.under is None and not self.parts

    def on(self, side: int, const: bool) -> Root:
        """The same in the left or the right factor of products, which may be a parameter."""
        if (side, const) not in self.sides:
            self.sides[side, const] = Root(self.learned or const, under=self, side=side, fixed=const)
        return self.sides[side, const]

    def origins(self) -> set[Root]:
        """Itself, and what it was joined or picked of."""
        return {self, *self.picked, *self.inside()}

    def inside(self) -> set[Root]:
        """What it was joined of: kept, for joins of joins are many in a deep model."""
        if self.kept is None:
            self.kept = leaves(part.dim for part in self.parts if part.dim is not None)
        return self.kept


class Factor(NamedTuple):
    """A digit of a dimension: `size` values of a root, `stride` apart. No root: the same all along."""

    root: Root | None
    stride: int
    size: int


Dim = tuple[Factor, ...]
"""The digits of a dimension, the outermost first; none for a dimension of one index."""


class Part(NamedTuple):
    """What a joined root holds from `start` on; nothing known where `dim` is None."""

    start: int
    size: int
    dim: Dim | None
    at: Mapping[Root, int]
    scores: bool = False


class Written(NamedTuple):
    """What was written along a dimension: what it counts, where that begins, and at which indices, (size,) int64."""

    dim: Dim
    at: Mapping[Root, int]
    places: Tensor


class Between(NamedTuple):
    """What logits are between: the dimensions of the left and of the right factor that the other has not.

    at: where these begin. projected: whether all that was summed over are features, so that heads are known; outer:
    whether nothing was. caller: of the product. elsewhere: whether what both share is not the same tokens in both;
    fixed: whether a factor is made of parameters alone, as a table of positions is.
    """

    left: tuple[Dim, ...]
    right: tuple[Dim, ...]
    at: Mapping[Root, int]
    projected: bool
    outer: bool
    caller: Any
    elsewhere: bool
    fixed: bool

    def of(self, side: int) -> tuple[Dim, ...]:
        """The dimensions of the left (0) or the right (1) factor."""
        return self.right if side else self.left


@dataclass(frozen=True, slots=True)
class Label:
    """dims: of a tensor. at: where its first element is, of each root that it has to do with.

    between: of logits.
    """

    dims: tuple[Dim, ...]
    at: Mapping[Root, int] = field(default_factory=dict)
    between: Between | None = None

    def roots(self) -> Iterator[Root]:
        """Those that its dimensions count."""
        return roots_of(self.dims)

    @property
    def sides(self) -> set[int]:
        """Which factors of a product of activations are still told apart."""
        return {root.side for root in self.roots() if root.side is not None}


def roots_of(dims: Iterable[Dim]) -> Iterator[Root]:
    """Those that dimensions count."""
    return (factor.root for dim in dims for factor in dim if factor.root is not None)


def leaves(dims: Iterable[Dim]) -> set[Root]:
    """The same, and of joined ones what they were joined of."""
    found: set[Root] = set()
    for root in roots_of(dims):
        found |= root.inside() if root.parts else {root}
    return found


def fresh(shape: Shape, **what: Any) -> Label:
    """A label of a tensor of which nothing is known."""
    roots = [Root(**what) for _ in shape]
    return Label(tuple(counted(root, size) for root, size in zip(roots, shape, strict=True)), dict.fromkeys(roots, 0))


def counted(root: Root, size: int) -> Dim:
    """A dimension that counts one root."""
    return (Factor(root, 1, size),) if size > 1 else ()


def size_of(dim: Dim) -> int:
    """How many indices it has."""
    return prod(factor.size for factor in dim)


def merged(dim: Iterable[Factor]) -> Dim:
    """The same with neighbouring digits of one root as one."""
    found: list[Factor] = []
    for factor in dim:
        last = found[-1] if found else None
        if last is not None and last.root is factor.root and last.stride == factor.stride * factor.size:
            found[-1] = Factor(factor.root, factor.stride, last.size * factor.size)
        elif factor.size > 1:
            found.append(factor)
    return tuple(found)


def differ(mine: Sequence[Dim], other: Sequence[Dim]) -> bool:
    """Whether shared dimensions count tokens of one sequence otherwise: a window for each query, another block."""
    for place, pair in enumerate(zip(mine, other, strict=True)):
        a, b = ([f for f in dim if f.root and not f.root.learned][not place :] for dim in pair)
        roots = [{root for f in factors if f.root for root in f.root.lowest.origins()} for factors in (a, b)]
        moved = [f[1:] for f in a] != [f[1:] for f in b] or any(f.root.lowest.picked for f in (*a, *b) if f.root)
        if a and b and a != b and moved and roots[0] & roots[1]:
            return True
    return False


def is_context(scores: Label, other: Label) -> bool:
    """Whether scores are between features of keys and values, and weigh those of queries, as in linear attention.

    By custom queries are made first; where channels attend to channels, what is weighed is made last.
    """
    of = scores.between
    if of is None or not all(root.learned for side in (0, 1) for root in roots_of(of.of(side))):
        return False
    sides = [_first_made(of.of(side), of.at) for side in (0, 1)]
    weighed = _first_made(other.dims, other.at)
    return bool(weighed and all(side and weighed < side for side in sides))


def _first_made(dims: Iterable[Dim], at: Mapping[Root, int]) -> tuple[int, int, int] | None:
    made = ((root.lowest.made, at.get(root, 0)) for root in roots_of(dims))
    return min(((by[0].order, by[1], place) for by, place in made if by is not None), default=None)


# ---- views


class Memory(NamedTuple):
    """Where a tensor's elements are."""

    shape: Shape
    strides: Shape
    offset: int


def in_order(shape: Shape) -> Memory:
    """As if it were contiguous: what a reshape goes by."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return Memory(shape, tuple(reversed(strides)), 0)


class _Digit(NamedTuple):
    step: int
    factor: Factor
    start: int


def viewed(label: Label, before: Memory, after: Memory) -> Label | None:
    """The label of another view of the same memory; None where it is not one of whole digits."""
    steps = sorted(_steps(label, before), key=lambda pair: -pair[0])
    at, rest, digits = dict(label.at), after.offset - before.offset, []
    for step, factor in steps:
        start = rest // step if rest >= 0 else -1
        if not 0 <= start < factor.size:
            return None
        rest -= start * step
        digits.append(_Digit(step, factor, start))
        if factor.root is not None:
            at[factor.root] = at.get(factor.root, 0) + start * factor.stride
    if rest:
        return None
    dims = [_decoded(digits, size, stride) for size, stride in zip(after.shape, after.strides, strict=True)]
    return None if None in dims else Label(tuple(dims), at, label.between)  # type: ignore[arg-type]


def _steps(label: Label, memory: Memory) -> Iterator[tuple[int, Factor]]:
    for dim, stride in zip(label.dims, memory.strides, strict=True):
        step = stride
        for factor in reversed(dim):
            if step:
                yield step, factor
            step *= factor.size


def _decoded(digits: list[_Digit], size: int, stride: int) -> Dim | None:
    """Which digits a dimension of this stride walks along, from the smallest on; digits: the largest step first."""
    if size == 1:
        return ()
    if not stride:
        return (Factor(None, 0, size),)
    found: list[Factor] = []
    while size > 1:
        digit = _digit_for(digits, size, stride)
        if digit is None:
            return None
        by, length = stride // digit.step, digit.factor.size
        if digit.start + (size - 1) * by < length:
            taken = size
        elif length % by or size % (length // by) or digit.start >= by:
            return None
        else:
            taken = length // by
        found.append(Factor(digit.factor.root, digit.factor.stride * by, taken))
        size, stride = size // taken, digit.step * length
    return merged(reversed(found))


def _digit_for(digits: list[_Digit], size: int, stride: int) -> _Digit | None:
    """The digit that a step of this stride counts; of overlapping ones, the one of this size."""
    fits = [d for d in digits if stride % d.step == 0 and stride < d.step * d.factor.size]
    best = [d for d in fits if d.step == fits[0].step]
    return next((d for d in best if d.factor.size == size), best[0] if best else None)
