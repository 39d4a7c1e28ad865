"""The functions by which hand-written attention is recognised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Function = Callable[..., Any]

_NAMESPACES = (torch, Tensor, functional, torch.special, torch.linalg)


def _named(*names: str) -> Iterator[Function]:
    """Every function and method of these names, and what works in place under them."""
    for name in names:
        for namespace in _NAMESPACES:
            for spelled in (name, f"{name}_", f"__{name}__"):
                found = getattr(namespace, spelled, None)
                if callable(found):
                    yield found


PRODUCTS = frozenset(_named("matmul", "bmm", "mm", "baddbmm", "einsum", "rmatmul"))
"""What multiplies queries with keys, and weights with values."""

FIRST_OPERAND = dict.fromkeys(_named("baddbmm"), 1)
"""Where the two operands begin, if not at 0."""

SWAPPED = frozenset(_named("rmatmul"))
"""Those that multiply their second argument with their first."""

SOFTMAXES = frozenset(_named("softmax"))

LOG_SOFTMAXES = frozenset(_named("log_softmax"))

EXPONENTIALS = frozenset(_named("exp"))

SUMS = frozenset(_named("sum"))

DIVISIONS = frozenset(_named("div", "divide", "true_divide"))

DIFFERENCES = frozenset(_named("sub", "subtract"))

RESCALINGS = DIVISIONS | frozenset(_named("mul", "multiply", "rdiv", "tanh"))
"""What changes by how much logits differ: a shift that was taken off before is not one any more."""

CONCATENATIONS = frozenset(_named("cat", "concat", "concatenate"))

PERMUTATIONS = frozenset(
    (
        *_named("transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "adjoint"),
        *(getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH")),
    )
)

PARTS = frozenset(_named("chunk", "split", "unbind", "tensor_split"))
"""Those that return several tensors, each of which holds rows of logits."""

INDEXING = frozenset((*_named("getitem", "select", "narrow", "index_select"), *PARTS))
"""What picks some rows, or some keys."""

VALUE_KEEPING = frozenset(
    _named("detach", "clone", "contiguous", "to", "float", "half", "bfloat16", "double", "type", "type_as")
)

SHAPE_KEEPING = VALUE_KEEPING | frozenset(
    _named(
        *("add", "rsub", "masked_fill", "where", "clamp", "clip", "clamp_min", "clamp_max", "maximum", "minimum"),
        *("max", "min", "nan_to_num", "addcmul", "dropout", "alpha_dropout", "normalize"),
        *("view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze"),
        *("expand", "expand_as", "broadcast_to"),
    )
)

CARRIERS = SHAPE_KEEPING | DIFFERENCES | RESCALINGS | CONCATENATIONS | PERMUTATIONS | INDEXING | SUMS
"""All through which logits and weights are followed."""
