"""What is written into tensors, a cache of fixed length, scores that are put in place part by part; what is lost; and
what convolutions leave where it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchprobe.capture.attention import functions as fn
from torchprobe.capture.attention.joins import along, beside, is_expanded, sliced, spliced
from torchprobe.capture.attention.labels import Dim, Factor, Indices, Label, Root, Written, counted, roots_of, size_of
from torchprobe.capture.attention.tape import Node


def written(node: Node, first: Label) -> Label | None:
    """Of a tensor into which another one of as many dimensions was written along one; of any other, as it was, but for
    scores, which are lost."""
    source, axis, where, single = _copied(node) if node.func in fn.INDEX_COPIES else _assigned(node)
    if source is None or source.label is None or source.dims + len(single) != node.dims:
        return None if any(one.is_logits for one in node.inputs[1:]) else first
    dims, shape = list(source.label.dims), list(source.shape)
    for one in single:
        dims.insert(one, ())
        shape.insert(one, 1)
    label = Label(tuple(dims), source.label.at, source.label.between)
    if any(a != b for i, (a, b) in enumerate(zip(node.shape, shape, strict=True)) if i != axis):
        return first
    if isinstance(where, Node):
        return _at_places(node, label, axis, where)
    start, stop = where
    return _between(node, first, label, axis, (start, shape[axis])) if stop - start == shape[axis] else first


def copied(node: Node, first: Label) -> Label | None:
    """All of another tensor; of a view, what else that is of holds it somewhere."""
    source = node.argument(1, "src")
    return source.label if isinstance(source, Node) and source.shape == node.shape else None


def lost(node: Node, labels: list[Label]) -> str | None:
    """By what it is not known any more what logits are of, or which of a folded dimension are heads."""
    before = next((root.lost for label in labels for root in label.roots() if root.lost), None)
    cut = node.sharing and any(len({root.learned for root in roots_of([dim])}) > 1 for dim in labels[0].dims)
    if before is not None or not (cut or any(label.sides for label in labels)):
        return before
    return str(getattr(node.func, "__name__", node.func)).strip("_")


def picked(node: Node, labels: list[Label]) -> frozenset[Root]:
    """What it was taken from, where it is not known which of that came where."""
    roots = (
        {root.lowest for label in labels for root in {*label.roots(), *label.at}} if node.func in fn.PICKS else set()
    )
    return frozenset(one for root in roots if not root.learned for one in root.origins())


def chosen(node: Node, inputs: tuple[Node, ...], label: Label | None) -> Label | None:
    """What a choice of two makes of them, where one has a single index and the other several: a token in a cache."""
    values = [one for one in inputs if one.dtype.is_floating_point and one.dims == node.dims]
    shape = next((one.shape for one in inputs if one.dtype is torch.bool), ())
    if label is None or label.sides or node.func not in fn.CHOICES or len(values) < 2:
        return label
    of = frozenset(origin for one in values if one.label for root in one.label.at for origin in root.lowest.origins())
    dims, at = list(label.dims), dict(label.at)
    for axis, size in enumerate(node.shape):
        varies = node.dims - axis <= len(shape) and shape[axis - node.dims] == size > 1
        if varies and any((one.shape[axis] == 1 or _is_same(one, axis)) and not one.const for one in values):
            root = Root(picked=frozenset(root for root in of if not root.learned))
            dims[axis], at[root] = (Factor(root, 1, size),), 0
    return Label(tuple(dims), at, label.between)


def _is_same(node: Node, axis: int) -> bool:
    """Whether all indices of a dimension hold one token."""
    return node.label is not None and is_expanded(node.label.dims[axis])


def goes_round(dim: Dim, keys: Mapping[Root, Indices], index: Any, queries: int) -> bool:
    """Whether keys from before stand behind queries that were written among them: older ones, where a cache goes round.

    dim: of the keys, keys: what they count. index: of a key for each query, None for the same.
    """
    between = (np.diff(at, prepend=-1) for at, _ in _one_by_one(keys))  # -1: others may come before the first
    steps = (np.diff(counted, prepend=-1) for _, counted in _one_by_one(keys))
    written = any(((gaps > 1) & (gaps == each)).any() for gaps, each in zip(between, steps, strict=True))
    if not written and not any(root.lowest.over or root.lowest.written for root in roots_of([dim])):
        return False
    if isinstance(index, Tensor):
        if not index.is_cpu:
            return True
        index = index.numpy()  # in host memory: no wait
    own, many = np.arange(queries) if index is None else index, size_of(dim)
    return bool((np.diff(own) != 1).any()) or len(np.setdiff1d(np.arange(own.min(initial=many), many), own)) > 0


def leaves_out(keys: Mapping[Root, Indices], queries: Mapping[Root, Indices]) -> bool:
    """Whether keys side by side were further apart, or in another order, in what they were taken from, as far as that
    is known: not of those that were picked from what the queries are."""
    mine = {one for root, at in queries.items() if at.min() < at.max() for one in root.origins()}
    if any(at.min() < at.max() and root not in queries and root.picked & mine for root, at in keys.items()):
        return True
    steps = [(np.diff(at), abs(np.diff(counted))) for at, counted in _one_by_one(keys) if len(at) > 1]
    return any((each > gaps * each.min()).any() for gaps, each in steps)


def _one_by_one(keys: Mapping[Root, Indices]) -> Iterator[tuple[Indices, Indices]]:
    """Of what keys count that no two have alike: which keys have it, and which of it."""
    for root, values in keys.items():
        at = np.flatnonzero(values >= 0)
        if len(at) and not root.learned and len(np.unique(values[at])) == len(at):
            yield at, values[at]


def _at_places(node: Node, label: Label, axis: int, where: Node) -> Label | None:
    """Where it was written is known on the device alone."""
    if node.small is None or where.dims != 1 or label.sides:
        return None
    dim = label.dims[axis]
    root = Root(written=Written(dim, beside(label, dim), node.small % node.shape[axis]))
    others = label.dims[:axis], label.dims[axis + 1 :]
    counts = (Factor(root, 1, node.shape[axis]),) if node.shape[axis] > 1 else ()
    kept = {r: v for r, v in label.at.items() if any(f.root is r for d in (*others[0], *others[1]) for f in d)}
    return Label((*others[0], counts, *others[1]), {**kept, root: 0})


def _between(node: Node, first: Label, label: Label, axis: int, where: tuple[int, int]) -> Label | None:
    size, (start, length) = node.shape[axis], where
    if length == size:
        return label
    ends = [(0, start), (start + length, size - start - length)]
    old = [sliced(first, axis, size, begin, many) if many else None for begin, many in ends]
    if any(part is None and many for part, (_, many) in zip(old, ends, strict=True)):
        return None
    labels = [one for one in (old[0], label, old[1]) if one is not None]
    sizes = [n for n in (ends[0][1], length, ends[1][1]) if n]
    dim, at = along(labels, [one.dims[axis] for one in labels], sizes)
    if ends[1][1] and (parts := [part for root in roots_of([dim]) for part in root.parts]):
        root = Root(all(one.learned for one in roots_of([dim])), tuple(parts), over=True)
        dim, at = (Factor(root, 1, size),), {root: 0}
    return spliced(first if first.sides and not label.sides else label, axis, axis + 1, dim, at)


Found = tuple["Node | None", int, Any, list[int]]


def _copied(node: Node) -> Found:
    axis, where, source = node.argument(1, "dim"), node.argument(2, "index"), node.argument(3, "source")
    if not (isinstance(axis, int) and isinstance(where, Node) and isinstance(source, Node)):
        return None, 0, None, []
    return source, axis % node.dims, where, []


def _assigned(node: Node) -> Found:
    """The one dimension along which an assignment is to a part; and those of which one index is."""
    key, source = node.argument(1, "key"), node.argument(2, "value")
    if not isinstance(source, Node):
        return None, 0, None, []
    parts = _spelled(key if isinstance(key, list) else [key], node.dims)
    ranges = [_range(part, size) for part, size in zip(parts, node.shape, strict=False)]
    chosen = [i for i, (part, size) in enumerate(zip(ranges, node.shape, strict=False)) if part != (0, size)]
    single = [i for i, part in enumerate(parts) if isinstance(part, int)]
    if None in ranges or len(chosen) > 1 or not ranges or (single and source.is_logits):
        return None, 0, None, []
    axis = chosen[0] if chosen else 0
    return source, axis, ranges[axis], single


def _spelled(key: Sequence[Any], dims: int) -> list[Any]:
    """Without an ellipsis."""
    where = next((i for i, part in enumerate(key) if part is Ellipsis), None)
    if where is None:
        return list(key)
    return [*key[:where], *[slice(None)] * (dims - len(key) + 1), *key[where + 1 :]]


def _range(part: Any, size: int) -> Any:
    """(start, stop), or the tensor that says where; None for anything else."""
    if isinstance(part, Node):
        return part
    if isinstance(part, int) and not isinstance(part, bool):
        return part % size, part % size + 1
    if not isinstance(part, slice) or not all(one is None or isinstance(one, int) for one in (part.start, part.stop)):
        return None
    start, stop, step = part.indices(size)
    return (start, stop) if step == 1 else None


# ---- convolutions


def convolved(node: Node, first: Label) -> Label | None:
    """Places stay where there are as many as before. Channels do, where each has its own weights, or there are none."""
    image, weight = _image(node, node.shape), node.argument(1, "weight")
    label = image.label or first
    root = Root(learned=True, made=fn.parameters_of(weight))
    dims, at = list(label.dims), {**label.at, root: 0}
    if node.func not in fn.POOLS:
        if not isinstance(weight, Node) or not weight.const or node.dims != weight.dims or image.dims != node.dims:
            return None
        if weight.shape[1] != 1 or not node.shape[1] == image.shape[1] > 1:
            if any(one.side is not None and not one.learned for one in roots_of(dims[1:2])):
                return None  # queries or keys are mixed
            dims[1] = counted(root, node.shape[1])
    elif len(dims) != node.dims or node.dims < 3:
        return None
    for axis in range(2, node.dims):
        if node.shape[axis] != image.shape[axis]:
            place = _resized(dims[axis], node.shape[axis])
            dims[axis], at[place] = counted(place, node.shape[axis]), 0
    return Label(tuple(dims), at, label.between)


def _resized(dim: Dim, size: int) -> Root:
    """What other places than before count, each made of several: the same where queries and keys have as many."""
    of = frozenset(one for root in roots_of([dim]) if not root.learned for one in root.lowest.origins())
    root = dim[0].root if len(dim) == 1 else None
    return Root(picked=of) if root is None else root.resized.setdefault(size, Root(picked=of))


def _image(node: Node, shape: tuple[int, ...]) -> Node:
    """What a convolution is of: what was padded for it, where its result has as many places as that."""
    image = node.inputs[0]
    before = image.inputs[0] if image.func in fn.PADS and image.inputs else image
    return before if before.label is not None and before.shape[2:] == shape[2:] else image


def cut(node: Node, whole: Node) -> Label | None:
    """What is left of a convolution that has more places than it is of, once it has as many."""
    if whole.func not in fn.CONVOLUTIONS or not whole.inputs or whole.shape[:2] != node.shape[:2] or node.dims < 3:
        return None
    image, step = _image(whole, node.shape), np.max(whole.argument(3, "stride", 1))
    as_many = image.shape[2:] == node.shape[2:] != whole.shape[2:]
    if step > 1 or not as_many or image.label is None or whole.label is None:
        return None
    dims = (*whole.label.dims[:2], *image.label.dims[2:])
    counts = {*roots_of(dims)}
    at = {root: value for one in (image.label, whole.label) for root, value in one.at.items() if root in counts}
    return Label(dims, at)
