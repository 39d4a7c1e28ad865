"""Where the queries of an attention stand among its keys, told by which tokens both are."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchprobe.capture.attention.labels import Dim, Factor, Indices, Label, Root, differ, roots_of, size_of
from torchprobe.capture.attention.writes import goes_round, leaves_out
from torchprobe.statistics.dtypes import moved


class Axis(NamedTuple):
    """A digit of a dimension of the logits: the dimension, and which digit of it."""

    dim: int
    digit: int
    factor: Factor

    @property
    def root(self) -> Root:
        """What it counts."""
        return self.factor.root or _NOWHERE


Roles = tuple[list[Axis], list[Axis], list[Axis], list[Axis]]
Values = Mapping[Root, Indices]
"""Of each root, the values that some indices have."""

Named = frozenset[tuple[Root, bytes]]
_NOWHERE = Root()


class Tokens(NamedTuple):
    """A sequence in a batch: what its entries and its positions count."""

    batch: Hashable
    place: Hashable


@dataclass(frozen=True, slots=True)
class Places:
    """Where queries stand. cross: not among the keys. index: of a key for each query; None: of the same index.

    queries: which tokens the queries are; keys: and the keys, -1 for those that are none. joined: the queries as the
    whole that they are, where they are not one sequence from its beginning. unknown: whether it is of the keys'
    sequence, and not known where. entries: which sequences of a batch they are. alone: the one query there is of others
    than the keys. open: whether keys behind the queries were in a cache before.
    """

    cross: bool
    index: Indices | Tensor | None
    queries: Mapping[Tokens, Indices] = field(default_factory=dict)
    keys: Mapping[Tokens, Indices] = field(default_factory=dict)
    joined: Tokens | None = None
    unknown: bool = False
    entries: Values = field(default_factory=dict)
    alone: frozenset[tuple[int, int]] | None = None
    open: bool = False

    def on(self, device: torch.device) -> Tensor | None:
        """The index as a tensor."""
        index = torch.from_numpy(self.index) if isinstance(self.index, np.ndarray) else self.index
        return None if index is None else moved(index, device)


def places(label: Label, roles: Roles, side: int, columns: Indices) -> Places:
    """Where the queries of logits stand among their keys."""
    assert label.between is not None
    asked = tuple(axis.factor for axis in roles[2])
    queries, size = coordinates(asked, label.at), size_of(asked)
    flat = tuple(factor for dim in label.between.of(side) for factor in dim)
    counted = coordinates(flat, label.between.at)
    keys = {root: np.where(columns < 0, -1, value[columns]) for root, value in counted.items()}
    of_queries = {root: value for root, value in label.at.items() if root.side == 1 - side}
    of_keys = {root: value for root, value in label.between.at.items() if root.side == side}
    mine = resolved(_numbers(of_queries, size) | queries)
    theirs = resolved(_numbers(of_keys, len(columns)) | keys)
    batch = tuple(axis.factor for axis in roles[0])
    entries = resolved(coordinates(batch, label.at))
    found = among(mine, theirs, size, len(columns), label.between.projected, named(entries))
    entries = resolved(_numbers(label.at, size_of(batch))) | entries
    behind = goes_round(flat, theirs, found.index, size)
    return replace(found, unknown=found.unknown or label.between.elsewhere, entries=entries, open=behind)


def of_dot_product(query: Label, key: Label, queries: int, keys: int) -> Places:
    """The same of queries and keys (batch, …, tokens, width) that a call names."""
    known = all(dim and all(root.learned for root in roots_of([dim])) for dim in (query.dims[-1], key.dims[-1]))
    mine, theirs = (_tokens(label) for label in (query, key))
    batch = [factor for dim in query.dims[: max(1, len(query.dims) - 3)] for factor in dim]
    rows = tuple(factor for factor in batch if not (factor.root and factor.root.learned))
    entries = resolved(coordinates(rows, query.at)) if len(query.dims) > 2 else {}
    if any(len(values) and len(next(iter(values.values()))) != n for values, n in ((mine, queries), (theirs, keys))):
        return Places(queries != keys, None)
    shared = min(query, key, key=lambda label: len(label.dims)).dims[:-2]
    elsewhere = differ(*(label.dims[len(label.dims) - 2 - len(shared) : -2] for label in (query, key)))
    found = among(mine, theirs, queries, keys, known, named(entries))
    entries = resolved(_numbers(query.at, size_of(rows))) | entries
    behind = goes_round(key.dims[-2], theirs, found.index, queries)
    return replace(found, unknown=found.unknown or elsewhere, entries=entries, open=behind)


def by_custom(queries: int, keys: int) -> Places:
    """Where nothing else is known, as many queries as keys are the same tokens."""
    if queries != keys:
        return Places(True, None)
    tokens = {Tokens(Root(), Root()): np.arange(keys)}
    return Places(False, None, tokens, tokens)


def _tokens(label: Label) -> dict[Root, Indices]:
    dim = label.dims[-2]
    counted = {root.lowest for root in label.roots()}  # in a product's factors too
    pinned = _numbers({root: value for root, value in label.at.items() if root.lowest not in counted}, size_of(dim))
    return resolved(pinned | coordinates(dim, label.at))


def named(values: Values) -> Named:
    """What some indices are, as a whole: nothing else that is counted is equal to it."""
    return frozenset((root, values[root].tobytes()) for root in _moving(values))


def whole(values: Values) -> Root | None:
    """What some indices count, where it is one thing from its beginning."""
    root = next(iter(values)) if len(values) == 1 else None
    return root if root is not None and np.array_equal(values[root], np.arange(len(values[root]))) else None


def among(queries: Values, keys: Values, size: int, length: int, known: bool, batch: Named) -> Places:
    """From what they count: queries stand where a key has the same token. known: whether where both come from is."""
    common = [root for root in queries if root in keys and not root.learned]
    found = _matched([queries[root] for root in common], [keys[root] for root in common], length)
    index: Indices | Tensor | None = _where_written(queries, keys) if found is None else found
    others = size != length or named(queries) != named(keys)
    related = _are_related(queries, keys, {one for one, _ in batch}) or any(root.may_be_tokens for root in keys)
    cross = index is None and (known or size != length) and (others or not related)
    of_queries = next(iter(moving)) if len(moving := _moving(queries)) == 1 else None
    if beside := index is None and others and related:
        cross, index = False, _after_the_first(queries, keys)
    elif cross and of_queries is not None and size > 1 and (np.diff(queries[of_queries]) == 1).all():
        index = queries[of_queries] if queries[of_queries][0] >= 0 else None
    if isinstance(index, np.ndarray) and np.array_equal(index, np.arange(size)):
        index = None
    of, joined = _tokens_of(batch, queries)
    of_keys, also = _tokens_of(batch, keys)
    of_keys |= {also: np.arange(length)} if also else {}
    one = {(id(root), int(value[0])) for root, value in queries.items() if not root.learned and len(value)}
    alone = frozenset({*one, *((id(root), 0) for root, _ in batch)}) if cross and size == 1 < length else None
    lost = (beside and index is None and length > 1) or (found is not None and others and leaves_out(keys, queries))
    return Places(cross, index, of, of_keys, joined, lost, alone=alone)


def _are_related(queries: Values, keys: Values, batch: set[Root]) -> bool:
    """Whether both are of one sequence, as far as what was picked or joined tells."""
    mine = {one for root in queries if not root.learned for one in root.origins()} - batch
    theirs = [root for root in _moving(keys) if root not in batch] or [root for root in keys if not root.learned]
    return any(mine & root.origins() for root in theirs if root not in batch)


def _after_the_first(queries: Values, keys: Values) -> Indices | None:
    """Where queries stand that are no keys, counted from the first of consecutive keys."""
    moving = _moving(keys)
    if len(moving) != 1 or moving[0] not in queries or (np.diff(keys[moving[0]]) != 1).any():
        return None
    index: Indices = queries[moving[0]] - keys[moving[0]][0]
    return index if min(queries[moving[0]].min(), keys[moving[0]][0]) >= 0 else None


def _tokens_of(batch: Hashable, values: Values) -> tuple[dict[Tokens, Indices], Tokens | None]:
    """The tokens that some indices are; and the whole of them, where it is not one sequence from its beginning."""
    moving = {root: values[root] for root in _moving(values)}
    joined = None if whole(moving) or not moving else Tokens(batch, named(moving))
    return {Tokens(batch, root): value for root, value in moving.items()}, joined


def _where_written(queries: Values, keys: Values) -> Tensor | None:
    """The places of queries whose own keys were written into a cache, where only the device knows these."""
    for root, at in keys.items():
        if root.written is None or not np.array_equal(at, np.arange(len(at))):
            continue
        dim, begin, index = root.written
        size = index.numel()
        own = resolved(_numbers(begin, size) | coordinates(dim, begin))
        common = [one for one in queries if one in own and not one.learned]
        found = _matched([queries[one] for one in common], [own[one] for one in common], size)
        if found is not None:
            return index[moved(torch.from_numpy(found), index.device)]
    return None


def _numbers(at: Mapping[Root, int], size: int, features: Iterable[Root] = ()) -> dict[Root, Indices]:
    return {root: np.full(size, value) for root, value in at.items() if not root.learned or root in features}


def _matched(queries: list[Indices], keys: list[Indices], length: int) -> Indices | None:
    """The key with the same tokens as each query; None unless every query has one, and each key its own."""
    if not queries:
        return None
    mine, theirs = np.zeros(len(queries[0]), np.int64), np.zeros(length, np.int64)
    for query, key in zip(queries, keys, strict=True):
        most = max(query.max(initial=0), key.max(initial=0)) + 2
        mine, theirs = mine * most + query + 1, theirs * most + key + 1
    if np.array_equal(mine, theirs) and len(np.unique(mine)) == length:
        return np.arange(length)
    # Joined ones have nothing, -1, of what other parts count: what has none of all that varies is no token.
    vary = [key for key in keys if key.min(initial=0) < key.max(initial=0)] or keys
    known = np.flatnonzero(np.any([key >= 0 for key in vary], axis=0))
    known = known[np.argsort(theirs[known], kind="stable")]
    ordered = theirs[known]
    if not len(ordered) or (np.diff(ordered) == 0).any() or len(np.unique(mine)) < len(mine):
        return None
    at = np.searchsorted(ordered, mine).clip(max=len(ordered) - 1)
    return known[at] if np.array_equal(ordered[at], mine) else None


def _moving(values: Values) -> list[Root]:
    """What is counted, but for what stays the same."""
    return [root for root, v in values.items() if not root.learned and len(v) and v.min() < v.max()]


# ---- coordinates: which values of what they count the indices of a dimension are, also of what was joined


def coordinates(dim: Dim, at: Mapping[Root, int]) -> dict[Root, Indices]:
    """Of each root that a dimension counts, the value at each index."""
    size, inner = size_of(dim), 1
    index = np.arange(size)
    found: dict[Root, Indices] = {}
    for factor in reversed(dim):
        if factor.root is not None:
            digit = index // inner % factor.size * factor.stride
            found[factor.root] = found.get(factor.root, at.get(factor.root, 0)) + digit
        inner *= factor.size
    return found


def resolved(values: Values) -> dict[Root, Indices]:
    """The same in roots that were neither joined nor factors of a product; -1 where an index has none of it."""
    return _opened({root.lowest: value for root, value in values.items()}, resolved)


def of_factors(values: Values) -> dict[Root, Indices]:
    """The same in roots that were not joined since they met in a product; -1 where an index has none of it."""
    return _opened(values, of_factors)


Further = Callable[[Values], "dict[Root, Indices]"]


def _opened(values: Values, further: Further) -> dict[Root, Indices]:
    """Joined roots as what they were joined of. What several count, as rows and columns of an image, adds up."""
    found = {root: value for root, value in values.items() if not root.parts or not _table(root, further)}
    begin = dict(found)
    for root, value in values.items():
        for inner, (column, counted) in _table(root, further).items() if root.parts else ():
            inside = (value >= 0) & (value < len(column))
            each = np.where(inside, column[np.where(inside, value, 0)], -1)
            if inner in begin and counted:
                found[inner] = np.where(each < 0, -1, found[inner] + each - begin[inner])
            else:
                found[inner] = np.where(each < 0, found[inner], each) if inner in found else each
    return found


Table = dict[Root, tuple[Indices, bool]]


def _table(root: Root, further: Further) -> Table:
    """Of each value of a joined root, what it is of others; and whether parts count that, or are pinned to it."""
    if further not in root.tables:
        columns, counted = _in_parts(root, further), _counted_in(root, further)
        root.tables[further] = {inner: (column, inner in counted) for inner, column in columns.items()}
    return root.tables[further]


def _counted_in(root: Root, further: Further) -> set[Root]:
    found: set[Root] = set()
    for inner in roots_of(part.dim for part in root.parts if part.dim is not None):
        below = inner.lowest if further is resolved else inner
        found |= {r for r, (_, counted) in _table(below, further).items() if counted} if below.parts else {below}
    return found


def _in_parts(root: Root, further: Further) -> dict[Root, Indices]:
    found: dict[Root, Indices] = {}
    size = max(part.start + part.size for part in root.parts)
    for part in root.parts:
        if part.dim is None:
            continue
        for inner, each in further(
            _numbers(part.at, part.size, root.inside()) | coordinates(part.dim, part.at)
        ).items():
            found.setdefault(inner, np.full(size, -1))[part.start : part.start + part.size] = each
    return found
