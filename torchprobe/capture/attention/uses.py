"""What single calls of an attention that is written out are: a product of scores, a dropout written by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from torchprobe.capture.attention import functions as fn
from torchprobe.capture.attention.products import Product
from torchprobe.capture.attention.tape import Args, Kwargs, Node, Tape
from torchprobe.capture.attention.weights import Flow

MIXED = "whose weights are mixed by parameters, so that some may be negative"
_FEW = 8  # calls between random numbers and what they drop


def drops(node: Node, flow: Flow) -> bool:
    """Whether a call multiplies weights with random numbers alone, or with the number that makes up for that."""
    if flow.kind != "weights" or node.func not in fn.FILLS | fn.MULTIPLICATIONS | fn.DIVISIONS | fn.CHOICES:
        return False
    others = [one for one in node.inputs if one.flow is None]
    if not others:
        return flow.dropped and len(list(node.inputs)) == 1
    return all(map(_is_drawn, others))


def _is_drawn(node: Node) -> bool:
    """Whether it is made of random numbers, whose chances depend on nothing."""
    for _ in range(_FEW):
        before = list(node.inputs)
        if node.func in fn.RANDOM:
            return node.func in fn.RANDOM_LIKE or not before or not list(before[0].inputs) or before[0].func in fn.LIKE
        if len(before) != 1:
            return False
        node = before[0]
    return False


def may_be_scores(node: Node, product: Product) -> bool:
    """An activation times a parameter is a layer; parameters may come first, or stand in an einsum."""
    left, right = product.factors
    if left.const and right.const:
        return False
    return not right.const or node.func in fn.EINSUMS


def hold_places(node: Node, args: Args, kwargs: Kwargs) -> None:
    """Where a write went, which may be changed in place soon after."""
    key = kwargs.get("index", args[2 if node.func in fn.INDEX_COPIES else 1] if len(args) > 2 else None)
    keys = key if isinstance(key, tuple | list) else (key,)
    found = [one for one in keys if isinstance(one, Tensor) and one.dim() == 1 and one.dtype is torch.int64]
    if len(found) == 1:
        node.hold(found[0].detach().clone())


def tensor_of(tape: Tape, node: Node, args: Args, kwargs: Kwargs) -> Tensor | None:
    """The tensor among a call's arguments that a node stands for."""
    values = [*args, *kwargs.values()]
    values += [one for value in values if isinstance(value, tuple | list) for one in value]
    return next((value for value in values if isinstance(value, Tensor) and tape.known(value) is node), None)
