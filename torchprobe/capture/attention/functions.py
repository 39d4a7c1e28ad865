"""The functions by which hand-written attention is recognised: a table by what they do to labels."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Function = Callable[..., Any]

_NAMESPACES = (torch, Tensor, functional, torch.special, torch.linalg)


def _named(*names: str) -> frozenset[Function]:
    """Every function and method of these names, and what works in place under them."""
    spelled = [way for name in names for way in (name, f"{name}_", f"__{name}__", f"__i{name}__")]
    found = (getattr(namespace, way, None) for way in spelled for namespace in _NAMESPACES)
    return frozenset(one for one in found if callable(one))


SOFTMAXES = _named("softmax")
LOG_SOFTMAXES = _named("log_softmax")

DRAWN = _named("gumbel_softmax")
"""Those whose inside is not seen, and whose result are weights."""

EXPONENTIALS = _named("exp")
SUMS = _named("sum")
LOG_SUMS = _named("logsumexp")
DIVISIONS = _named("div", "divide", "true_divide", "truediv")
DIFFERENCES = _named("sub", "subtract")
ADDITIONS = _named("add")
FILLS = _named("masked_fill")
CHOICES = _named("where")
DROPOUTS = _named("dropout", "alpha_dropout", "feature_dropout", "dropout1d", "dropout2d", "dropout3d")
CASTS = _named("to", "float", "half", "bfloat16", "double", "type", "type_as")

SAME = CASTS | _named("detach", "clone", "contiguous", "requires_grad", "cpu", "cuda")
"""What keeps values where they are."""

RESHAPES = _named("view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "ravel")
_POINTWISE = frozenset(("rsub", "rdiv", "rtruediv", "rpow", "radd", "rmul", "truediv", "invert", "divide", "relu6"))


@cache
def is_pointwise(func: Function) -> bool:
    """Whether a function works element by element, its arguments broadcast: as PyTorch's operator of its name says."""
    name = str(getattr(func, "__name__", "")).strip("_")
    if not str(getattr(func, "__module__", None) or "torch").startswith("torch"):
        return False
    packet = getattr(torch.ops.aten, name, None) or getattr(torch.ops.aten, name.removeprefix("i"), None)
    overloads = packet.overloads() if packet is not None and hasattr(packet, "overloads") else ()
    return name in _POINTWISE or any(torch.Tag.pointwise in getattr(packet, one).tags for one in overloads)


ALONG = (
    SOFTMAXES
    | LOG_SOFTMAXES
    | DROPOUTS
    | DRAWN
    | _named("softmin", "layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "normalize")
    | _named("tril", "triu", "cumsum", "cumprod", "local_response_norm", "renorm", "fill")
    | _named("masked_scatter", "index_fill", "bernoulli", "zero")
)
"""What keeps the order of everything, though an element may depend on others."""

REDUCTIONS = (
    SUMS
    | LOG_SUMS
    | _named("mean", "amax", "amin", "var", "std", "norm", "vector_norm", "prod", "argmax", "argmin", "nansum")
)

EXTREMES = _named("max", "min")
"""Reductions where they get a dimension, pointwise where they get another tensor."""

CONCATENATIONS = _named("cat", "concat", "concatenate")
STACKS = _named("stack")
PADS = _named("pad")
ROLLS = _named("roll")
FLIPS = _named("flip")
REPEATS = _named("repeat", "tile")
INTERLEAVES = _named("repeat_interleave")
ITERATIONS = frozenset((Tensor.__iter__,))
RANKINGS = _named("topk", "sort")
SCATTERS = _named("scatter")
INDEX_COPIES = _named("index_copy")

WRITES = INDEX_COPIES | _named("setitem")
"""What writes one tensor into another."""

COPIES = frozenset((Tensor.copy_,))
EMBEDDINGS = _named("embedding")
CONVOLUTIONS = _named("conv1d", "conv2d", "conv3d")
EINSUMS = _named("einsum")
TENSORDOTS = _named("tensordot")

PRODUCTS = {
    **dict.fromkeys(_named("matmul", "mm", "bmm"), 0),
    **dict.fromkeys(_named("baddbmm", "addmm"), 1),
    **dict.fromkeys((*EINSUMS, *TENSORDOTS), 0),
    **dict.fromkeys(_named("linear", "inner", "cdist", "rmatmul"), 0),
}
"""What multiplies, and where the two factors begin among its tensors."""

LAST_WITH_LAST = _named("linear", "inner", "cdist")
"""Those that go along the last dimension of both."""

SWAPPED = _named("rmatmul")
"""Those that multiply their second argument with their first."""

DISTANCES = _named("cdist")

POOLS = _named(
    *(f"{kind}_pool{dims}d" for kind in ("avg", "max", "adaptive_avg", "adaptive_max") for dims in (1, 2, 3)),
    "interpolate",
)
"""What keeps all but the last dimensions of an image."""

NORMS = _named("norm")
"""Reductions whose dimension comes after the order."""

TOPS = _named("topk")
LARGEST = _named("amax")
UNSQUEEZES = _named("unsqueeze", "getitem")
MULTIPLICATIONS = _named("mul", "multiply")

JOINS = CONCATENATIONS | STACKS | PADS | ROLLS | FLIPS
"""What puts values elsewhere, and leaves them as they are."""


@cache
def is_in_place(func: Function | None) -> bool:
    """Whether a function changes its first argument."""
    name = str(getattr(func, "__name__", ""))
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


RANDOM_LIKE = _named("rand_like", "randn_like")
RANDOM = RANDOM_LIKE | _named("rand", "randn", "bernoulli", "uniform")
LIKE = _named("empty_like", "ones_like", "full_like", "zeros_like", "new_empty", "new_full", "new_ones")

WITHOUT_NAN = _named("nan_to_num")
"""What changes no row that counts: one with NaN does not."""
