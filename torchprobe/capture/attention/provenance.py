"""Whether queries and keys were made from the same tensor: self-attention, or cross-attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_DEPTH = 18  # autograd nodes from a query back to its layer's input: projection, norm, rotation, repetition

_PROJECTIONS = ("Addmm", "Mm", "Bmm", "Baddbmm", "Linear", "MkldnnLinear", "Convolution")

_Nodes = set[Any]


def same_source(query: Tensor, key: Tensor) -> bool | None:
    """Whether the autograd graphs of both meet a few nodes back; None where there is no graph to tell.

    A decoder's queries descend from the encoder's output too, through the layer before, but not that closely.
    """
    sides = ({query.grad_fn} - {None}, {key.grad_fn} - {None})
    if not sides[0] or not sides[1]:
        return None
    seen: tuple[_Nodes, _Nodes] = (set(sides[0]), set(sides[1]))
    frontiers: tuple[_Nodes, _Nodes] = sides
    ends = [False, False]
    for _ in range(_DEPTH):
        if not seen[0].isdisjoint(seen[1]):
            return True
        frontiers = (_before(frontiers[0], seen[0], ends, 0), _before(frontiers[1], seen[1], ends, 1))
        if not frontiers[0] and not frontiers[1]:
            break
    if not seen[0].isdisjoint(seen[1]):
        return True
    return None if all(ends) else False


def _before(frontier: _Nodes, seen: _Nodes, ends: list[bool], side: int) -> _Nodes:
    """The nodes one step back; notes in `ends` where something without a graph, so unknown, was projected."""
    found: _Nodes = set()
    for node in frontier:
        for behind, _ in node.next_functions:
            before = _beyond_slices(behind)
            if before is None:
                ends[side] |= node.name().startswith(_PROJECTIONS)
            elif not hasattr(before, "variable") and before not in seen:  # a parameter is shared by everything
                found.add(before)
    seen |= found
    return found


def _beyond_slices(node: Any) -> Any:
    """Slices do not count: in torch 2.6, half of the last dimension is one slice for each dimension."""
    while node is not None and node.name().startswith("Slice"):
        node = node.next_functions[0][0]
    return node


def is_cross(query: Tensor, key: Tensor, queries: int, keys: int) -> bool:
    """Cross-attention: as many queries as keys does not hold, or their source differs. Unknown counts as self."""
    return queries != keys or same_source(query, key) is False
