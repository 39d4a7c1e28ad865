"""What the dimensions of logits are: which are batch, heads, queries and keys, and where queries stand among keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchprobe.capture.attention.labels import (
    Dim,
    Factor,
    Indices,
    Label,
    Root,
    coordinates,
    of_factors,
    resolved,
    roots_of,
    size_of,
)
from torchprobe.capture.attention.layout import by_head
from torchprobe.statistics.attention.rows import moved


class Refused(NamedTuple):
    """It is an attention, but what its numbers mean is not known."""

    reason: str


class Tokens(NamedTuple):
    """A sequence in a batch: what its entries and its positions count."""

    batch: Root | None
    place: Root


@dataclass(frozen=True, slots=True)
class Places:
    """Where queries stand. cross: not among the keys. index: of a key for each query; None: of the same index.

    tokens, at: which tokens the queries are; keys: and the keys, -1 for those that are none.
    """

    cross: bool
    index: Indices | None
    tokens: Tokens | None = None
    at: Indices | None = None
    keys: Mapping[Tokens, Indices] = field(default_factory=dict)

    def on(self, device: torch.device) -> Tensor | None:
        """The index as a tensor."""
        return None if self.index is None else moved(torch.from_numpy(self.index), device)


class Axis(NamedTuple):
    """A digit of a dimension of the logits: the dimension, and which digit of it."""

    dim: int
    digit: int
    factor: Factor


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How logits become (batch, heads, queries, keys).

    order: their digits, by role. keys: which columns are keys, in order, and sinks: which are not; None for all, and
    for none. named: whether heads are told by where they come from. side: of the keys in the product; of_keys: the
    index of each key there. axis: the dimension of the keys; latent: what parameters that are queries count.
    """

    sizes: tuple[tuple[int, ...], ...]
    order: tuple[tuple[int, ...], ...]
    keys: Indices | None
    sinks: Indices | None
    named: bool
    places: Places
    side: int
    of_keys: Indices
    axis: int
    latent: frozenset[Root]

    def by_head(self, x: Tensor, heads: int | None) -> Tensor:
        """Logits, or something with the same dimensions, as (batch, heads, queries, all columns).

        heads: how many the module says it has, which decides only where the data flow does not tell.
        """
        return self._ordered(x, self.sizes, heads)

    def by_row(self, x: Tensor, heads: int | None) -> Tensor:
        """A number for each row of logits, as (batch, heads, queries, 1)."""
        sizes = [tuple(1 for _ in each) if i == self.axis else each for i, each in enumerate(self.sizes)]
        return self._ordered(x, sizes, heads)

    @property
    def is_plain_batch(self) -> bool:
        """Whether the first dimension is the batch, and the last one holds the columns."""
        return self.axis == len(self.sizes) - 1 and self.order[0] == (0,) and len(self.sizes[0]) == 1

    def _ordered(self, x: Tensor, all_sizes: Sequence[tuple[int, ...]], heads: int | None) -> Tensor:
        parts = x.reshape([size for sizes in all_sizes for size in sizes])
        parts = parts.permute([axis for group in self.order for axis in group])
        lengths = [len(group) for group in self.order]
        batch, of_heads, queries, _ = lengths
        shape = parts.shape
        tail = (
            shape[batch + of_heads : batch + of_heads + queries].numel(),
            shape[batch + of_heads + queries :].numel(),
        )
        if self.named:
            return parts.reshape(shape[:batch].numel(), shape[batch : batch + of_heads].numel(), *tail)
        return by_head(parts.reshape(*shape[:batch], *tail), heads)

    def split(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """The keys of (batch, heads, queries, columns), and the other columns."""
        if self.keys is None:
            return logits, None
        return _columns(logits, self.keys), None if self.sinks is None else _columns(logits, self.sinks)


def _columns(x: Tensor, index: Indices) -> Tensor:
    if len(index) and np.array_equal(index, np.arange(index[0], index[0] + len(index))):
        return x[..., int(index[0]) : int(index[0]) + len(index)]
    return x.index_select(-1, moved(torch.from_numpy(index), x.device))


def arrangement(label: Label, shape: tuple[int, ...], axis: int, as_used: bool = False) -> Arrangement | Refused | None:
    """Of logits with a softmax over a dimension; None where that is no attention. as_used: of weights, all columns of
    which are used with values."""
    lost = next((root.lost for root in roots_of([label.dims[axis]]) if root.lost), None)
    if lost is not None:
        return Refused(f"whose scores pass `{lost}`")
    of_keys = set(roots_of([label.dims[axis]]))
    sides = {root.side for root in of_keys}
    if label.between is not None and shape[axis] == 1:  # a single key: the first step of a cache
        sides = {side for side in (1, 0) if not any(label.between.of(side))} and {1}
    if label.between is None or len(sides) != 1 or None in sides or any(root.fixed for root in of_keys):
        return None
    side = sides.pop()
    assert side is not None
    digits = [Axis(i, j, f) for i, dim in enumerate(label.dims) for j, f in enumerate(dim)]
    roles = _roles(label, digits, axis, 1 - side)
    columns = columns_of(label, axis, side)
    if as_used and isinstance(columns, tuple):
        columns = None, columns[2], columns[2]
    if isinstance(columns, Refused):
        return columns
    if not roles[2] and _overlaps(label, axis, side):
        return Refused("over a window of keys for each query")
    return _arranged(label, shape, roles, columns, side)


Roles = tuple[list[Axis], list[Axis], list[Axis], list[Axis]]


def _roles(label: Label, digits: list[Axis], keys: int, side: int) -> Roles:
    """Digits of the batch, of heads, of queries and of keys. side: of the queries."""
    assert label.between is not None
    mine = list(roots_of(label.between.of(side)))
    last = next((dim for dim in reversed(label.between.of(side)) if dim), ())
    asked = {root for root in mine if label.between.projected or root in set(roots_of([last]))}
    others = [digit for digit in digits if digit.dim != keys]
    queries = [d for d in others if _root(d) in asked and not _root(d).learned]
    queries = queries or [d for d in others if _root(d) in asked]
    dims = {d.dim for d in queries}
    heads = [d for d in others if _root(d).learned and d not in queries]
    of_heads = {d.dim for d in heads}
    heads += [d for d in others if d.factor.root is None and d.dim in of_heads]
    heads.sort(key=lambda d: (d.dim, d.digit))
    queries += [d for d in others if d.factor.root is None and d.dim in dims - of_heads]
    order = {root: i for i, root in reversed(list(enumerate(mine)))}
    queries.sort(key=lambda d: (order.get(_root(d), len(mine)), -d.factor.stride))
    batch = [d for d in others if d not in heads and d not in queries]
    return batch, heads, queries, [d for d in digits if d.dim == keys]


_NOTHING = Root()


def _root(axis: Axis) -> Root:
    return axis.factor.root or _NOTHING


def _arranged(label: Label, shape: tuple[int, ...], roles: Roles, columns: Columns, side: int) -> Arrangement | Refused:
    assert label.between is not None
    keys, of_keys, _ = columns
    sizes = tuple(tuple(f.size for f in dim) if dim else (n,) for dim, n in zip(label.dims, shape, strict=True))
    place: dict[tuple[int, int], int] = {}
    for i, each in enumerate(sizes):
        for j in range(len(each)):
            place[i, j] = len(place)
    order = [tuple(place[a.dim, a.digit] for a in role) for role in roles]
    used = {axis for group in order for axis in group}
    order[0] = tuple(sorted((*order[0], *(axis for axis in place.values() if axis not in used))))
    named = bool(roles[1]) or label.between.projected
    if named and not (roles[3] or shape):
        return Refused("over no keys")
    sinks = None if keys is None else np.setdiff1d(np.arange(size_of_roles(roles[3])), keys)
    where = places(label, roles, side, of_keys)
    sinks = sinks if sinks is not None and len(sinks) else None
    axis = roles[3][0].dim if roles[3] else len(shape) - 1
    mine = frozenset(root.under for role in roles[2] if (root := _root(role)).fixed and root.under is not None)
    return Arrangement(sizes, tuple(order), keys, sinks, named, where, side, of_keys, axis, mine)


def size_of_roles(axes: Iterable[Axis]) -> int:
    """How many indices digits have together."""
    return size_of(tuple(axis.factor for axis in axes))


Columns = tuple[Indices | None, Indices, Indices]


def columns_of(label: Label, axis: int, side: int) -> Columns | Refused:
    """Which columns are keys, in the order of the keys, None for all as they stand; the index of each key among those
    of the product; and of each column, -1 for one that is no key."""
    assert label.between is not None
    values = of_factors(coordinates(label.dims[axis], label.at))
    index = _index_among(label.between.of(side), label.between.at, values, size_of(label.dims[axis]))
    keys = np.flatnonzero(index >= 0)
    keys = keys[np.argsort(index[keys], kind="stable")]
    found = index[keys]
    if not len(keys) or (len(found) > 1 and (np.diff(found) != 1).any()):
        return Refused("whose keys are picked or repeated")
    same = len(keys) == len(index) and np.array_equal(keys, np.arange(len(keys)))
    return None if same else keys, found, index


def _index_among(dims: tuple[Dim, ...], at: Mapping[Root, int], values: Mapping[Root, Indices], size: int) -> Indices:
    """Of each column, its index in the dimensions of a product's factor; -1 for none."""
    index, inner, missing = np.zeros(size, dtype=np.int64), 1, np.zeros(size, dtype=bool)
    for dim in reversed(dims):
        for factor in reversed(dim):
            if factor.root is not None and factor.root in values:
                value = values[factor.root]
                missing |= value < 0
                index += (value - at.get(factor.root, 0)) // factor.stride % factor.size * inner
            inner *= factor.size
    if not any(factor.root in values for dim in dims for factor in dim) and size > 1:
        missing[:] = True
    return np.where(missing, -1, index)


def _overlaps(label: Label, axis: int, side: int) -> bool:
    """Whether keys and what is no query of theirs count the same tokens: a window that moves with it."""
    assert label.between is not None
    mine = {root for root in resolved(coordinates(label.dims[axis], label.at)) if not root.learned}
    others = [dim for i, dim in enumerate(label.dims) if i != axis]
    theirs = resolved({root: np.zeros(1, dtype=np.int64) for root in roots_of(others)})
    return bool(mine & set(theirs))


# ---- where queries stand


def places(label: Label, roles: Roles, side: int, columns: Indices) -> Places:
    """Where the queries of logits stand among their keys."""
    assert label.between is not None
    queries = coordinates(tuple(axis.factor for axis in roles[2]), label.at)
    size = size_of_roles(roles[2])
    flat = tuple(factor for dim in label.between.of(side) for factor in dim)
    counted = coordinates(flat, label.between.at)
    keys = {root: np.where(columns < 0, -1, value[columns]) for root, value in counted.items()}
    mine = resolved(_pinned(label.at, 1 - side, size) | queries)
    theirs = resolved(_pinned(label.between.at, side, len(columns)) | keys)
    batch = _whole(roles[0])
    return among(mine, theirs, size, len(columns), label.between.projected, batch)


def of_dot_product(query: Label, key: Label, queries: int, keys: int) -> Places:
    """The same of queries and keys (batch, …, tokens, width) that a call names."""
    known = all(_is_learned(label.dims[-1]) for label in (query, key))
    mine, theirs = (_tokens(label) for label in (query, key))
    batch = [Axis(0, i, factor) for i, factor in enumerate(query.dims[0])] if len(query.dims) > 2 else []
    if any(len(values) and len(next(iter(values.values()))) != n for values, n in ((mine, queries), (theirs, keys))):
        return Places(queries != keys, None)
    return among(mine, theirs, queries, keys, known, _whole([one for one in batch if not _root(one).learned]))


def by_custom(queries: int, keys: int) -> Places:
    """Where nothing else is known, as many queries as keys are the same tokens."""
    if queries != keys:
        return Places(True, None)
    tokens, at = Tokens(Root(), Root()), np.arange(keys)
    return Places(False, None, tokens, at, {tokens: at})


def _is_learned(dim: Dim) -> bool:
    return bool(dim) and all(root.learned for root in roots_of([dim]))


def _tokens(label: Label) -> dict[Root, Indices]:
    dim = label.dims[-2]
    others = set(roots_of(d for i, d in enumerate(label.dims) if i != len(label.dims) - 2))
    size = size_of(dim)
    pinned = {r: np.full(size, v) for r, v in label.at.items() if not r.learned and r not in others}
    return resolved(pinned | coordinates(dim, label.at))


def _pinned(at: Mapping[Root, int], side: int, size: int) -> dict[Root, Indices]:
    return {root: np.full(size, value) for root, value in at.items() if root.side == side and not root.learned}


def _whole(batch: list[Axis]) -> Root | None:
    """What the batch counts, where it counts one thing."""
    roots = [axis.factor for axis in batch if axis.factor.root is not None]
    if len(batch) != 1 or len(roots) != 1 or roots[0].stride != 1:
        return None
    return next(iter(resolved({roots[0].root: np.zeros(1, dtype=np.int64)})), None)  # type: ignore[dict-item]


def among(
    queries: Mapping[Root, Indices],
    keys: Mapping[Root, Indices],
    size: int,
    length: int,
    known: bool,
    batch: Root | None,
) -> Places:
    """From what they count: queries stand where a key has the same token. known: whether where both come from is."""
    common = [root for root in queries if root in keys and not root.learned]
    index = _matched([queries[root] for root in common], [keys[root] for root in common], length)
    cross = index is None and (known or size != length)
    of_queries = next(iter(moving)) if len(moving := _moving(queries)) == 1 else None
    if cross and of_queries is not None and size > 1:
        index = queries[of_queries]
    if index is not None and np.array_equal(index, np.arange(size)):
        index = None
    by_tokens = {Tokens(batch, root): keys[root] for root in _moving(keys)}
    if of_queries is None:
        return Places(cross, index, keys=by_tokens)
    return Places(cross, index, Tokens(batch, of_queries), queries[of_queries], by_tokens)


def _matched(queries: list[Indices], keys: list[Indices], length: int) -> Indices | None:
    """The key with the same tokens as each query; None unless every query has one, and each key its own."""
    if not queries:
        return None
    mine, theirs = np.zeros(len(queries[0]), np.int64), np.zeros(length, np.int64)
    for query, key in zip(queries, keys, strict=True):
        most = max(query.max(initial=0), key.max(initial=0)) + 1
        mine, theirs = mine * most + query, np.where((key < 0) | (theirs < 0), -1, theirs * most + key)
    known = np.flatnonzero(theirs >= 0)
    known = known[np.argsort(theirs[known], kind="stable")]
    ordered = theirs[known]
    if not len(ordered) or (np.diff(ordered) == 0).any():
        return None
    at = np.searchsorted(ordered, mine).clip(max=len(ordered) - 1)
    return known[at] if np.array_equal(ordered[at], mine) else None


def _moving(values: Mapping[Root, Indices]) -> list[Root]:
    """What is counted, but for what stays the same."""
    return [root for root, v in values.items() if not root.learned and len(v) and v.min() < v.max()]
