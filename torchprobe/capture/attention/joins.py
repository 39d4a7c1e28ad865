"""What joins, rearranges, repeats and reduces tensors, and what that does to labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from torchprobe.capture.attention import functions as fn
from torchprobe.capture.attention.labels import (
    Dim,
    Factor,
    Label,
    Memory,
    Part,
    Root,
    counted,
    leaves,
    merged,
    roots_of,
    viewed,
)
from torchprobe.capture.attention.tape import Node

Rule = Callable[[Node, Label], Label | None]


def _tensors(node: Node) -> tuple[list[Node], list[Label]]:
    listed = node.argument(0, "tensors")
    nodes = [one for one in listed if isinstance(one, Node)] if isinstance(listed, list) else []
    nodes = [one for one in nodes if one.shape != (0,)] or nodes  # as torch does: an empty memory
    return nodes, [one.label for one in nodes if one.label is not None]


def joined(node: Node, first: Label) -> Label | None:
    """Along a dimension that all have, or along a new one."""
    (nodes, labels), axis, new = _tensors(node), node.argument(1, "dim", 0), node.func in fn.STACKS
    if not nodes or not isinstance(axis, int) or any(one.dims + new != node.dims for one in nodes):
        return None
    axis %= node.dims
    if not new and (whole := next((one for one in nodes if one.shape == node.shape), None)) is not None:
        return whole.label  # it alone, or beside what has no elements
    dims = [() if new else label.dims[axis] for label in labels]
    dim, at = along(labels, dims, [1 if new else one.shape[axis] for one in nodes])
    pinned = set.intersection(*({*label.at.items()} for label in labels)) if labels else set()
    counted_too = leaves((dim, *dims))
    at = {**{root: value for root, value in pinned if root not in counted_too}, **at}
    return spliced(_foremost(nodes, labels), axis, axis + (not new), dim, at)


def spliced(base: Label, start: int, stop: int, joined: Dim, at: Mapping[Root, int]) -> Label:
    """With a joined dimension in place of some; at: where it begins."""
    before, after = base.dims[:start], base.dims[stop:]
    return Label((*before, joined, *after), {**without(base.at, joined, (*before, *after)), **at}, base.between)


def _foremost(nodes: list[Node], labels: list[Label]) -> Label:
    ranked = (
        (not label.sides, node.const, any(map(is_expanded, label.dims)), place)
        for place, (node, label) in enumerate(zip(nodes, labels, strict=True))
    )
    return labels[min(ranked)[-1]]


def is_expanded(dim: Dim) -> bool:
    """Whether it counts nothing: the same all along."""
    return bool(dim) and all(factor.root is None for factor in dim)


def along(labels: Sequence[Label], dims: Sequence[Dim], sizes: Sequence[int]) -> tuple[Dim, Mapping[Root, int]]:
    """The joined dimension: a further digit of a root where the parts are equal steps along it, else a new root."""
    digits = _digits(labels) if len({*dims}) == 1 else ()
    if digits:
        return merged((*digits, *dims[0])), {f.root: labels[0].at[f.root] for f in digits if f.root is not None}
    parts, start = [], 0
    for label, dim, size in zip(labels, dims, sizes, strict=True):
        parts.append(Part(start, size, dim, beside(label, dim), bool(label.sides)))
        start += size
    root = _root_of(parts, apart=not any(dims) and len({*map(_tokens, labels)}) == 1)
    return (Factor(root, 1, start),) if start > 1 else (), {root: 0}


def _tokens(label: Label) -> tuple[Any, ...]:
    """What a label says but for features, which are others in each projection."""
    dims = tuple(tuple(f._replace(root=None) if f.root and f.root.learned else f for f in dim) for dim in label.dims)
    return dims, frozenset((root, value) for root, value in label.at.items() if not root.learned)


def without(at: Mapping[Root, int], joined: Dim, others: Iterable[Dim]) -> Mapping[Root, int]:
    """Without what only parts count, or are pinned to: where an element is of these, they say themselves."""
    said = {root for one in roots_of([joined]) for part in one.parts for root in part.at if root.side is None}
    inside = (leaves([joined]) | said) - leaves(others)
    return {root: value for root, value in at.items() if root not in inside}


def sliced(label: Label, axis: int, size: int, start: int, length: int) -> Label | None:
    """A part along one dimension."""
    part = _sliced(label.dims[axis], beside(label, label.dims[axis]), size, start, length)
    if part is None or part.dim is None:
        return None
    return Label((*label.dims[:axis], part.dim, *label.dims[axis + 1 :]), {**label.at, **part.at}, label.between)


def beside(label: Label, dim: Dim) -> Mapping[Root, int]:
    """Where a dimension begins, and what the tensor is pinned to besides."""
    others = set(label.roots()) - set(roots_of([dim]))
    return {root: value for root, value in label.at.items() if root not in others}


def _root_of(parts: Sequence[Part], apart: bool = False) -> Root:
    inside = [(part, root) for part in parts if part.dim is not None for root in roots_of([part.dim])]
    sides = {root.side for part, root in inside if part.scores}
    learned = bool(inside) and all(root.learned for _, root in inside)
    return Root(learned, tuple(parts), side=sides.pop() if len(sides) == 1 else None, apart=apart)


def _digits(labels: Sequence[Label]) -> Dim:
    """The roots in which labels differ, each in equal steps, as the digits of one number; none where that is not so."""
    first, outer, found = labels[0], len(labels), []
    differ = {root for label in labels for root in {*first.at, *label.at} if label.at.get(root) != first.at.get(root)}
    differ = {root for root in differ if root.under is None or root.under not in differ}
    if any(label.dims != first.dims or not differ <= label.at.keys() for label in labels):
        return ()
    columns = [(root, np.array([label.at[root] for label in labels])) for root in differ]
    for root, each in sorted(columns, key=lambda pair: -int((pair[1] != pair[1][0]).argmax())):
        inner = int((each != each[0]).argmax())
        by, size = int(each[inner] - each[0]), outer // inner
        if outer % inner or (each != each[0] + np.arange(len(each)) // inner % size * by).any():
            return ()
        found.append(Factor(root, by, size))
        outer = inner
    return tuple(found) if outer == 1 else ()


# ---- rearranged


def _sliced(dim: Dim, at: Mapping[Root, int], size: int, start: int, length: int) -> Part | None:
    found = viewed(Label((dim,), at), Memory((size,), (1,), 0), Memory((length,), (1,), start))
    return None if found is None else Part(0, length, found.dims[0], found.at)


def rolled(node: Node, first: Label) -> Label | None:
    """Along some dimensions, the last of which come first."""
    shifts, axes = _tuple(node.argument(1, "shifts")), _tuple(node.argument(2, "dims"))
    if shifts is None or axes is None or len(shifts) != len(axes):
        return None
    dims, at = list(first.dims), dict(first.at)
    for shift, axis in zip(shifts, axes, strict=True):
        size = node.shape[axis]
        shift %= size
        if not shift:
            continue
        begin = beside(first, dims[axis])
        ends = _sliced(dims[axis], begin, size, size - shift, shift), _sliced(dims[axis], begin, size, 0, size - shift)
        if None in ends:
            return None
        scores = any(root.side is not None for root in roots_of([dims[axis]]))
        parts = [ends[0]._replace(scores=scores), ends[1]._replace(start=shift, scores=scores)]  # type: ignore[union-attr]
        at = _replaced(dims, at, axis, Factor(_root_of(parts), 1, size))
    return Label(tuple(dims), at, first.between)


def _replaced(dims: list[Dim], at: Mapping[Root, int], axis: int, joined: Factor) -> dict[Root, int]:
    """Puts a joined dimension where the one was that it was made of; what the rest is pinned to."""
    dims[axis] = ()
    kept = without(at, (joined,), dims)
    dims[axis] = (joined,)
    return {**kept, joined.root: 0} if joined.root is not None else {**kept}


def flipped(node: Node, first: Label) -> Label | None:
    """Each digit the other way."""
    axes = _tuple(node.args[1:] if len(node.args) > 2 else node.argument(1, "dims"))
    if axes is None:
        return None
    dims, at = list(first.dims), dict(first.at)
    for axis in axes:
        for factor in dims[axis]:
            if factor.root is not None:
                at[factor.root] = at.get(factor.root, 0) + factor.stride * (factor.size - 1)
        dims[axis] = tuple(factor._replace(stride=-factor.stride) for factor in dims[axis])
    return Label(tuple(dims), at, first.between)


def padded(node: Node, first: Label) -> Label | None:
    """With constants at the ends."""
    widths, mode = _tuple(node.argument(1, "pad")), node.argument(2, "mode", "constant")
    if widths is None or mode != "constant" or min(widths) < 0:
        return None
    dims, at = list(first.dims), dict(first.at)
    for i in range(0, len(widths), 2):
        axis, before, total = node.dims - 1 - i // 2, widths[i], widths[i] + widths[i + 1]
        if total:
            size = node.shape[axis] - total
            scores = any(root.side is not None for root in roots_of([dims[axis]])) or (
                bool(first.sides) and dims[axis] == () and size == 1
            )
            root = _root_of([Part(before, size, dims[axis], beside(first, dims[axis]), scores)])
            at = _replaced(dims, at, axis, Factor(root, 1, size + total))
    return Label(tuple(dims), at, first.between)


def repeated(node: Node, first: Label) -> Label | None:
    """Whole, one after the other."""
    times = _tuple(node.args[1:] if len(node.args) > 2 else node.argument(1, "repeats", node.kwargs.get("dims")))
    if times is None:
        return None
    times = (1,) * (node.dims - len(times)) + times
    old = ((),) * (node.dims - len(first.dims)) + first.dims
    dims = (merged((Factor(None, 0, n), *dim)) for n, dim in zip(times, old, strict=True))
    return Label(tuple(dims), first.at, first.between)


def interleaved(node: Node, first: Label) -> Label | None:
    """Each one several times."""
    times, axis = node.argument(1, "repeats"), node.argument(2, "dim")
    if not isinstance(times, int) or not isinstance(axis, int):
        return None
    dims = list(first.dims)
    dims[axis] = merged((*dims[axis], Factor(None, 0, times)))
    return Label(tuple(dims), first.at, first.between)


def reduced(node: Node, first: Label) -> Label | None:
    """Without some dimensions, or with one index of each."""
    axes, before = _reduced_axes(node), len(first.dims)
    if axes is None:
        return None
    gone = {axis % before for axis in axes} if before else set()
    kept = [(() if i in gone else dim) for i, dim in enumerate(first.dims) if i not in gone or node.dims == before]
    counts = set(roots_of(kept))
    at = {root: v for root, v in first.at.items() if root in counts or root not in set(first.roots())}
    return Label(tuple(kept), at, first.between)


def _reduced_axes(node: Node) -> tuple[int, ...] | None:
    place = 2 if node.func in fn.NORMS else 1
    given = node.argument(place, "dim", node.kwargs.get("axis"))
    if given is None and not node.dims:
        return ()
    return _tuple(given)


def as_complex(node: Node, label: Label) -> Label:
    """Pairs of numbers as one, or one as a pair."""
    root = Root()
    pair = (counted(root, 2),) if node.dims > len(label.dims) else ()
    return Label((*label.dims[: node.dims - len(pair)], *pair), {**label.at, root: 0}, label.between)


def scattered(node: Node, first: Label) -> Label | None:
    """Ranked logits, put back where they were ranked from."""
    axis, index, values = node.argument(1, "dim"), node.argument(2, "index"), node.argument(3, "src")
    if not (isinstance(index, Node) and isinstance(values, Node)) or index.func is not values.func:
        return None
    ranked = values.args[0] if values.func in fn.RANKINGS and values.args else None
    same = index.args[:1] == values.args[:1]
    along = values.argument(2 if values.func in fn.TOPS else 1, "dim", -1)
    if not same or not isinstance(ranked, Node) or ranked.shape != node.shape or along % node.dims != axis % node.dims:
        return None
    return ranked.label if (values.part, index.part) == (0, 1) else None


def _tuple(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    if isinstance(value, tuple | list) and len(value) == 1 and isinstance(value[0], tuple | list):
        value = value[0]
    if isinstance(value, tuple | list) and all(isinstance(one, int) for one in value):
        return tuple(value)
    return None


RULES: Mapping[Any, Rule] = {
    **dict.fromkeys(fn.REDUCTIONS, reduced),
    **dict.fromkeys(fn.CONCATENATIONS | fn.STACKS, joined),
    **dict.fromkeys(fn.ROLLS, rolled),
    **dict.fromkeys(fn.FLIPS, flipped),
    **dict.fromkeys(fn.PADS, padded),
    **dict.fromkeys(fn.named("repeat", "tile"), repeated),
    **dict.fromkeys(fn.named("repeat_interleave"), interleaved),
    **dict.fromkeys(fn.SCATTERS, scattered),
}
"""By function."""
