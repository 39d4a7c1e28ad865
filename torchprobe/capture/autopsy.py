"""Explains NaN and inf in host memory from what an ordinary step leaves behind: the graph, gradients, parameters.

Runs once, when they are first seen, and reads values freely: it is for tensors in host memory only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchprobe.capture.outputs import is_numeric
from torchprobe.naming import owner_of

NO_MODULE = "(loss)"
_MOST_NODES = 50_000
_REACH = 4  # nodes between an operation and a parameter that it uses: a transposition, a cast

_Named = Sequence[tuple[str, nn.Parameter]]


class Finding(NamedTuple):
    """Which module, and what it did."""

    where: str
    text: str


def of_parameters(named: _Named) -> Finding | None:
    """Parameters that are not finite, when a forward pass uses them."""
    bad = [name for name, p in named if not _finite(p)]
    if not bad:
        return None
    return Finding(owner_of(bad[0]), f"{_listed(bad)} held NaN or inf before the forward pass")


def of_update(named: _Named) -> Finding | None:
    """Parameters that an optimizer's step has made non-finite from finite gradients."""
    bad = [name for name, p in named if not _finite(p)]
    if not bad or any(p.grad is not None and not _finite(p.grad) for _, p in named):
        return None
    return Finding(bad[0], f"the optimizer's update made {_listed(bad)} NaN or inf from finite gradients")


def of_gradients(named: _Named) -> Finding | None:
    """The last module, in the model's order, whose gradients are not finite: where the backward pass met them first."""
    states = [(owner_of(name), _finite(p.grad)) for name, p in named if p.grad is not None]
    bad = [module for module, finite in states if not finite]
    if not bad:
        return None
    if bad[-1] == states[-1][0] and len(bad) == len(states):
        text = (
            f"gradients of all parameters are NaN or inf though the model's output is finite: they come from the loss, "
            f"or from the backward pass of {bad[-1]}"
        )
        return Finding(NO_MODULE, text)
    return Finding(bad[-1], f"the backward pass of {bad[-1]} is the first to give NaN or inf, from finite gradients")


def of_output(named: _Named, outputs: Sequence[Tensor]) -> Finding | None:
    """The module after which a forward pass first held NaN or inf, from the tensors that its graph keeps."""
    damaged = of_parameters(named)
    if damaged is not None:
        return damaged
    nodes = _nodes(t.grad_fn for t in outputs)
    owners = _owners(nodes, {id(p): owner_of(name) for name, p in named})
    for i, node in enumerate(nodes):
        inputs, results = _saved(node)
        if not all(map(_finite, inputs)):
            return _made_before(nodes, owners, i, inputs)
        if not all(map(_finite, results)):
            return _named(nodes, owners, i, inputs)
    return _named(nodes, owners, len(nodes) - 1, []) if nodes else None


def _made_before(nodes: Sequence[Any], owners: Mapping[int, str], i: int, inputs: Sequence[Tensor]) -> Finding:
    """An operation was given non-finite numbers: by the operation before it, or as the model's input."""
    order = {node: n for n, node in enumerate(nodes)}
    before = [order[following] for following, _ in nodes[i].next_functions if following in order]
    if not before:
        return Finding(NO_MODULE, "the model's input holds NaN or inf")
    latest = max(before)
    return _named(nodes, owners, latest, _saved(nodes[latest])[0])


def _named(nodes: Sequence[Any], owners: Mapping[int, str], i: int, inputs: Sequence[Tensor]) -> Finding:
    """The module of an operation, or the one whose output it works on."""
    kind = "inf" if False else "NaN or inf"
    largest = max((float(t.detach().abs().max().numpy()) for t in inputs if t.numel()), default=None)
    given = "finite inputs" if largest is None else f"finite inputs (max |x| = {largest:.3g})"
    if i in owners:
        return Finding(owners[i], f"{owners[i]} produced {kind} from {given} in the forward pass")
    queue, seen = [i], set()
    order = {node: n for n, node in enumerate(nodes)}
    while queue:
        i = max(queue)
        queue.remove(i)
        if i in owners:
            what = f"{owners[i]}, or what is computed from its output next ({nodes[max(seen)].name()}),"
            return Finding(owners[i], f"{what} produced {kind} from {given} in the forward pass")
        seen.add(i)
        following = (order[f] for f, _ in nodes[i].next_functions if f in order)
        queue += [n for n in following if n not in seen and n not in queue]
    return Finding(NO_MODULE, f"an operation on the model's input ({nodes[max(seen)].name()}) produced {kind} from {given}")
