"""Which values the indices of a dimension are, of what they count: also of what was joined, and met in a product."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from torchprobe.capture.attention.labels import Dim, Indices, Root, roots_of, size_of


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


def resolved(values: Mapping[Root, Indices]) -> dict[Root, Indices]:
    """The same in roots that were neither joined nor factors of a product; -1 where an index has none of it."""
    return _opened({_under(root): value for root, value in values.items()}, resolved)


def of_factors(values: Mapping[Root, Indices]) -> dict[Root, Indices]:
    """The same in roots that were not joined since they met in a product; -1 where an index has none of it."""
    return _opened(values, of_factors)


def _under(root: Root) -> Root:
    while root.under is not None:
        root = root.under
    return root


Further = Callable[[Mapping[Root, Indices]], "dict[Root, Indices]"]


def _opened(values: Mapping[Root, Indices], further: Further) -> dict[Root, Indices]:
    """Joined roots as what they were joined of. What several count, as rows and columns of an image, adds up."""
    found = {root: value for root, value in values.items() if not root.parts}
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
        below = _under(inner) if further is resolved else inner
        found |= {r for r, (_, counted) in _table(below, further).items() if counted} if below.parts else {below}
    return found


def _in_parts(root: Root, further: Further) -> dict[Root, Indices]:
    found: dict[Root, Indices] = {}
    size = max(part.start + part.size for part in root.parts)
    for part in root.parts:
        if part.dim is None:
            continue
        pinned = {r: np.full(part.size, v) for r, v in part.at.items() if not r.learned}
        for inner, each in further(pinned | coordinates(part.dim, part.at)).items():
            found.setdefault(inner, np.full(size, -1))[part.start : part.start + part.size] = each
    return found
