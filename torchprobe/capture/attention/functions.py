"""The functions by which hand-written attention is recognised: a table by what they do to labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
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
            for spelled in (name, f"{name}_", f"__{name}__", f"__i{name}__"):
                found = getattr(namespace, spelled, None)
                if callable(found):
                    yield found


SOFTMAXES = frozenset(_named("softmax"))

LOG_SOFTMAXES = frozenset(_named("log_softmax"))

DRAWN = frozenset(_named("gumbel_softmax"))
"""Those whose inside is not seen, and whose result are weights."""

EXPONENTIALS = frozenset(_named("exp"))

SUMS = frozenset(_named("sum"))

LOG_SUMS = frozenset(_named("logsumexp"))

DIVISIONS = frozenset(_named("div", "divide", "true_divide", "truediv"))

DIFFERENCES = frozenset(_named("sub", "subtract"))

ADDITIONS = frozenset(_named("add"))

FILLS = frozenset(_named("masked_fill"))

CHOICES = frozenset(_named("where"))

DROPOUTS = frozenset(_named("dropout", "alpha_dropout", "feature_dropout", "dropout1d", "dropout2d", "dropout3d"))

CASTS = frozenset(_named("to", "float", "half", "bfloat16", "double", "type", "type_as"))

SAME = CASTS | frozenset(_named("detach", "clone", "contiguous", "requires_grad", "cpu", "cuda"))
"""What keeps values where they are."""

RESHAPES = frozenset(_named("view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "ravel"))

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
    | frozenset(
        (
            *_named("softmin", "layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "normalize"),
            *_named("tril", "triu", "cumsum", "cumprod", "local_response_norm", "renorm", "fill"),
            *_named("masked_scatter", "index_fill", "bernoulli", "zero"),
        )
    )
)
"""What keeps the order of everything, though an element may depend on others."""

REDUCTIONS = (
    SUMS
    | LOG_SUMS
    | frozenset(
        _named("mean", "amax", "amin", "var", "std", "norm", "vector_norm", "prod", "argmax", "argmin", "nansum")
    )
)

EXTREMES = frozenset(_named("max", "min"))
"""Reductions where they get a dimension, pointwise where they get another tensor."""

CONCATENATIONS = frozenset(_named("cat", "concat", "concatenate"))

STACKS = frozenset(_named("stack"))

PADS = frozenset(_named("pad"))

ROLLS = frozenset(_named("roll"))

FLIPS = frozenset(_named("flip"))

REPEATS = frozenset(_named("repeat", "tile"))

INTERLEAVES = frozenset(_named("repeat_interleave"))

ITERATIONS = frozenset((Tensor.__iter__,))

RANKINGS = frozenset(_named("topk", "sort"))

SCATTERS = frozenset(_named("scatter"))

INDEX_COPIES = frozenset(_named("index_copy"))

WRITES = INDEX_COPIES | frozenset(_named("setitem"))
"""What writes one tensor into another."""

COPIES = frozenset((Tensor.copy_,))

EMBEDDINGS = frozenset(_named("embedding"))

CONVOLUTIONS = frozenset(_named("conv1d", "conv2d", "conv3d"))

EINSUMS = frozenset(_named("einsum"))

TENSORDOTS = frozenset(_named("tensordot"))

PRODUCTS = {
    **dict.fromkeys(_named("matmul", "mm", "bmm"), 0),
    **dict.fromkeys(_named("baddbmm", "addmm"), 1),
    **dict.fromkeys((*EINSUMS, *TENSORDOTS), 0),
    **dict.fromkeys(_named("linear", "inner", "cdist", "rmatmul"), 0),
}
"""What multiplies, and where the two factors begin among its tensors."""

LAST_WITH_LAST = frozenset(_named("linear", "inner", "cdist"))
"""Those that go along the last dimension of both."""

SWAPPED = frozenset(_named("rmatmul"))
"""Those that multiply their second argument with their first."""

DISTANCES = frozenset(_named("cdist"))

POOLS = frozenset(
    _named(
        *(f"{kind}_pool{dims}d" for kind in ("avg", "max", "adaptive_avg", "adaptive_max") for dims in (1, 2, 3)),
        "interpolate",
    )
)
"""What keeps all but the last dimensions of an image."""

NORMS = frozenset(_named("norm"))
"""Reductions whose dimension comes after the order."""

TOPS = frozenset(_named("topk"))

LARGEST = frozenset(_named("amax"))

UNSQUEEZES = frozenset(_named("unsqueeze", "getitem"))

CLAMPS = frozenset(_named("clamp", "clip", "clamp_min", "maximum"))

MULTIPLICATIONS = frozenset(_named("mul", "multiply"))

JOINS = CONCATENATIONS | STACKS | PADS | ROLLS | FLIPS
"""What puts values elsewhere, and leaves them as they are."""


@cache
def is_in_place(func: Function | None) -> bool:
    """Whether a function changes its first argument."""
    name = str(getattr(func, "__name__", ""))
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


RANDOM_LIKE = frozenset(_named("rand_like", "randn_like"))

RANDOM = RANDOM_LIKE | frozenset(_named("rand", "randn", "bernoulli", "uniform"))

LIKE = frozenset(_named("empty_like", "ones_like", "full_like", "zeros_like", "new_empty", "new_full", "new_ones"))

WITHOUT_NAN = frozenset(_named("nan_to_num"))
"""What changes no row that counts: one with NaN does not."""
