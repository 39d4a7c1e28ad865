"""What the dimensions of an attention's tensors are: which are batch, heads, queries and keys.

By the data flow, which labels tell, and by custom where these do not.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchprobe.capture.attention.labels import Dim, Factor, Indices, Label, Part, Root, roots_of, size_of
from torchprobe.capture.attention.places import Axis, Places, Roles, coordinates, of_factors, places, resolved
from torchprobe.capture.attention.sites import Features, told_apart
from torchprobe.statistics.attention.keys import NEVER_A_LOGIT
from torchprobe.statistics.dtypes import moved

# ---- by custom


def by_name(parameters: Iterable[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments."""
    return dict(zip(parameters, args, strict=False)) | dict(kwargs)


def plain(tensor: Tensor) -> Tensor:
    """The same storage without a graph and without a subclass of the user's."""
    return tensor.detach().as_subclass(Tensor)


def by_head(tensor: Tensor, heads: int | None) -> Tensor:
    """A tensor (…, rows, columns) as (batch, heads, rows, columns).

    heads: how many the module has, where it says so. It decides what a 3-D tensor's first dimension is: batch times
    heads where divisible, as fairseq and `nn.MultiheadAttention` fold them, otherwise the batch of a single head.
    Of five and more dimensions the heads are the third from the right, or all between the batch and the rows where
    their product is the number of heads, as in grouped attention.
    """
    if tensor.dim() < 4:
        tensor = tensor[(None,) * (3 - tensor.dim())]
        return tensor.unsqueeze(1) if not heads or tensor.size(0) % heads else tensor.unflatten(0, (-1, heads))
    if tensor.dim() == 4:
        return tensor
    grouped = heads is not None and tensor.size(-3) != heads and math.prod(tensor.shape[1:-2]) == heads
    return tensor.flatten(1, -3) if grouped else tensor.flatten(0, -4)


def mask_by_head(mask: Tensor, leading: torch.Size, heads: int | None) -> Tensor:
    """A mask (…, queries, keys) of logits (*leading, queries, keys), for those logits as `by_head` shapes them."""
    if mask.dim() == 3 and len(leading) == 1 and mask.size(0) > 1:
        return by_head(mask, heads)
    if mask.dim() > 3 and len(leading) > 2:
        return mask.expand(*leading[:-1], -1, -1, -1).flatten(0, -4)
    return mask


def blocked(mask: Tensor, at: float = NEVER_A_LOGIT) -> Tensor:
    """True where a mask (bool: True takes part; float: added), or a masked logit, hides a key."""
    return ~mask if mask.dtype is torch.bool else mask <= at


def alike(hidden: Tensor) -> Tensor:
    """What is hidden from all queries of all heads, where that is all that is hidden: bool (batch, keys)."""
    first = hidden[:, 0, 0]
    return first & (hidden == first[:, None, None]).all()


# ---- by labels


def picked(x: Tensor, index: Indices) -> Tensor:
    """Some indices of the last dimension."""
    if len(index) and np.array_equal(index, np.arange(index[0], index[0] + len(index))):
        return x[..., int(index[0]) : int(index[0]) + len(index)]
    return x.index_select(-1, moved(torch.from_numpy(index), x.device))


class Refused(NamedTuple):
    """It is an attention, but what its numbers mean is not known."""

    reason: str


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How logits become (batch, heads, queries, keys).

    order: their digits, by role. keys: which columns are keys, in order, and sinks: which are not; None for all, and
    for none. named: whether heads are told by where they come from. side: of the keys in the product; of_keys: the
    index of each key there. axis: the dimension of the keys; latent: what parameters that are queries count. who: which
    heads they are, by where among the features that parameters made.
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
    who: tuple[Hashable, ...] | None

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
        ends = accumulate(map(len, self.order), initial=0)
        batch, of_heads, *others = (parts.shape[start:end] for start, end in pairwise(ends))
        tail = [sizes.numel() for sizes in others]
        if self.named:
            return parts.reshape(batch.numel(), of_heads.numel(), *tail)
        return by_head(parts.reshape(*batch, *tail), heads)

    def split(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """The keys of (batch, heads, queries, columns), and the other columns."""
        if self.keys is None:
            return logits, None
        return picked(logits, self.keys), None if self.sinks is None else picked(logits, self.sinks)


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
    lost = next((digit.root.lost for digit in roles[0] if digit.root.lost), None)
    if lost is not None:
        return Refused(f"whose heads pass `{lost}`")
    columns = columns_of(label, axis, side)
    if isinstance(columns, Refused):
        return columns
    if as_used:
        columns = None, columns[2], columns[2]
    if not roles[2] and (label.between.elsewhere or _overlaps(label, axis)):
        return Refused("over a window of keys for each query")
    return _arranged(label, shape, roles, columns, side)


def _roles(label: Label, digits: list[Axis], keys: int, side: int) -> Roles:
    """Digits of the batch, of heads, of queries and of keys. side: of the queries."""
    assert label.between is not None
    mine = list(roots_of(label.between.of(side)))
    last = next((dim for dim in reversed(label.between.of(side)) if dim), ())
    asked = {root for root in mine if label.between.projected or root in set(roots_of([last]))}
    others = [digit for digit in digits if digit.dim != keys]
    queries = [d for d in others if d.root in asked and not d.root.learned]
    if all(label.between.of(side)):  # else a dimension of one index is the query
        queries = queries or [d for d in others if d.root in asked]
    dims = {d.dim for d in queries}
    heads = [d for d in others if (d.root.learned or d.root.lowest.apart) and d not in queries]
    heads = [d for d in heads if not d.root.lowest.may_be_tokens] or heads  # beside heads that are known
    of_heads = {d.dim for d in heads}
    heads += [d for d in others if d.factor.root is None and d.dim in of_heads]
    heads.sort(key=lambda d: (d.dim, d.digit))
    queries += [d for d in others if d.factor.root is None and d.dim in dims - of_heads]
    order = {root: i for i, root in reversed(list(enumerate(mine)))}
    queries.sort(key=lambda d: (order.get(d.root, len(mine)), -d.factor.stride))
    batch = [d for d in others if d not in heads and d not in queries]
    return batch, heads, queries, [d for d in digits if d.dim == keys]


def _arranged(label: Label, shape: tuple[int, ...], roles: Roles, columns: Columns, side: int) -> Arrangement | Refused:
    assert label.between is not None
    keys, of_keys, index = columns
    sizes = tuple(tuple(f.size for f in dim) if dim else (n,) for dim, n in zip(label.dims, shape, strict=True))
    axes = [(i, j) for i, each in enumerate(sizes) for j in range(len(each))]
    place = {axis: at for at, axis in enumerate(axes)}
    order = [tuple(place[a.dim, a.digit] for a in role) for role in roles]
    used = {axis for group in order for axis in group}
    of_one = [axis for axis in place.values() if axis not in used]
    if of_one and not roles[2] and not all(label.between.of(1 - side)):
        order[2] = (of_one.pop(),)
    order[0] = tuple(sorted((*order[0], *of_one)))
    named = bool(roles[1]) or label.between.projected
    if named and not (roles[3] or shape):
        return Refused("over no keys")
    sinks = None if keys is None else np.setdiff1d(np.arange(len(index)), keys)
    where = places(label, roles, side, of_keys)
    sinks = sinks if sinks is not None and len(sinks) else None
    axis = roles[3][0].dim if roles[3] else len(shape) - 1
    mine = frozenset(root.under for role in roles[2] if (root := role.root).fixed and root.under is not None)
    who = _who(label, roles[1]) if named else None
    return Arrangement(sizes, tuple(order), keys, sinks, named, where, side, of_keys, axis, mine, who)


def _who(label: Label, heads: list[Axis]) -> tuple[Hashable, ...]:
    """Of each head, where it is among the features of all: other calls may have the others."""
    dim = tuple(axis.factor for axis in heads)
    found = told_apart(_features(dim, label), size_of(dim))
    return tuple(range(size_of(dim))) if found is None else found


def heads_of_call(query: Label, key: Label) -> tuple[Hashable, ...] | None:
    """The same of queries and keys (…, tokens, width) that a call names; None where it is not known."""
    dims = [tuple(f for dim in each.dims[:-2] for f in dim if is_head(f)) for each in (query, key)]
    found: Features = []
    many = size_of(dims[0])
    for side, (dim, label) in enumerate(zip(dims, (query, key), strict=True)):
        if size_of(dim) in (1, many):  # else heads share keys
            found += [(side, made, np.broadcast_to(at, many)) for _, made, at in _features(dim, label)]
    return told_apart(found, many) if found else None


def is_head(digit: Factor) -> bool:
    """Whether a digit before tokens and width counts heads, as far as is known."""
    return digit.root is not None and digit.root.learned and not digit.root.may_be_tokens


def _features(dim: Dim, label: Label) -> Features:
    """At each index, where among the features that parameters made it is."""
    pinned = {root: np.full(size_of(dim), value) for root, value in label.at.items()}
    values = of_factors(pinned | coordinates(dim, label.at))
    return [(root.side, root.lowest.made, at) for root, at in values.items() if root.lowest.made is not None]


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
    if any(part.scores and (index[part.start : part.start + part.size] < 0).all() for part in _parts(label.dims[axis])):
        return Refused("whose scores of one softmax are of several products")
    same = len(keys) == len(index) and np.array_equal(keys, np.arange(len(keys)))
    return None if same else keys, found, index


def _parts(dim: Dim) -> Iterator[Part]:
    """What it was joined of, where it counts that from its beginning to its end."""
    if len(dim) == 1 and dim[0].root is not None and dim[0].stride == 1:
        yield from dim[0].root.parts


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


def _overlaps(label: Label, axis: int) -> bool:
    """Whether keys and what is no query of theirs count the same tokens: a window that moves with it."""
    assert label.between is not None
    mine = {root for root in resolved(coordinates(label.dims[axis], label.at)) if not root.learned}
    others = [dim for i, dim in enumerate(label.dims) if i != axis]
    theirs = resolved({root: np.zeros(1, dtype=np.int64) for root in roots_of(others)})
    return bool(mine & set(theirs))
