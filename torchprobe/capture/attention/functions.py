"""The functions by which hand-written attention is recognised, by what they do to labels; and products of tensors,
whichever way they are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torchprobe.capture.attention.labels import roots_of
from torchprobe.capture.attention.tape import Node

Function = Callable[..., Any]

_NAMESPACES = (torch, Tensor, functional, torch.special, torch.linalg)


def named(*names: str) -> frozenset[Function]:
    """Every function and method of these names, and what works in place under them."""
    spelled = [way for name in names for way in (name, f"{name}_", f"__{name}__", f"__i{name}__")]
    found = (getattr(namespace, way, None) for way in spelled for namespace in _NAMESPACES)
    return frozenset(one for one in found if callable(one))


SOFTMAXES = named("softmax", "_softmax", "_safe_softmax")
LOG_SOFTMAXES = named("log_softmax", "_log_softmax")

GUMBEL = named("gumbel_softmax")
DRAWN = GUMBEL | named("softmin")
"""Those whose inside is not seen, and whose result are weights."""

EXPONENTIALS = named("exp")
POWERS = named("exp2", "rpow")
NORMALISED = named("normalize")
SUMS = named("sum")
LOG_SUMS = named("logsumexp")
DIVISIONS = named("div", "divide", "true_divide", "truediv")
DIFFERENCES = named("sub", "subtract")
ADDITIONS = named("add")
FILLS = named("masked_fill")
CHOICES = named("where")
DROPOUTS = named("dropout", "alpha_dropout", "feature_dropout", "dropout1d", "dropout2d", "dropout3d")
CASTS = named("to", "float", "half", "bfloat16", "double", "type", "type_as")

SAME = CASTS | named("detach", "clone", "contiguous", "requires_grad", "cpu", "cuda")
"""What keeps values where they are."""

RESHAPES = named("view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "ravel")
_POINTWISE = {
    *("rsub", "rdiv", "rtruediv", "rpow", "radd", "rmul", "truediv", "invert", "divide", "relu6", "softsign", "polar"),
    *("tanhshrink", "prelu", "log_sigmoid", "hardswish", "bucketize", "complex", "fake_quantize_per_tensor_affine"),
}


@cache
def is_pointwise(func: Function) -> bool:
    """Whether a function works element by element, its arguments broadcast: as PyTorch's operator of its name says."""
    name, operators = _operators(func)
    return name in _POINTWISE or any(torch.Tag.pointwise in one.tags for one in operators)


def _operators(func: Any) -> tuple[str, list[Any]]:
    """The name of a function of PyTorch's own, and what operators of that name it has."""
    name = str(getattr(func, "__name__", "")).strip("_")
    if not str(getattr(func, "__module__", None) or "torch").startswith("torch"):
        return "", []
    spelled = name, name.removeprefix("i"), name.removeprefix("special_")
    packets: list[Any] = [getattr(torch.ops.aten, one, None) for one in spelled]
    return name, [getattr(one, each) for one in packets if hasattr(one, "overloads") for each in one.overloads()]


@cache
def _dimension(func: Any) -> tuple[int, Any]:
    """Where an operator takes the dimension that it goes along, and what that is if it is not given; 0: nowhere."""
    arguments = (pair for one in _operators(func)[1] for pair in enumerate(one._schema.arguments))
    return next(((place, each.default_value) for place, each in arguments if each.name == "dim"), (0, None))


def along(node: Node) -> set[int]:
    """The dimensions that a function goes along, as far as that is known: the others are as a batch to it."""
    place, default = _dimension(node.func)
    given = node.argument(place, "dim", default) if place else None
    axes = given if isinstance(given, list) else [given]
    return {axis % node.dims for axis in axes if isinstance(axis, int) and node.dims}


ALONG = named(
    *("softmin", "gumbel_softmax", "layer_norm", "rms_norm", "group_norm", "batch_norm"),
    *("instance_norm", "local_response_norm", "normalize", "renorm", "tril", "triu", "fill", "zero", "bernoulli"),
    *("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "masked_scatter", "index_fill"),
).union(SOFTMAXES, LOG_SOFTMAXES, DROPOUTS)
"""What keeps the order of everything, though an element may depend on others."""

REDUCTIONS = named(
    *("sum", "nansum", "logsumexp", "mean", "amax", "amin", "var", "std", "norm", "vector_norm", "prod"),
    *("argmax", "argmin"),
)

EXTREMES = named("max", "min")
"""Reductions where they get a dimension, pointwise where they get another tensor."""

CONCATENATIONS = named("cat", "concat", "concatenate")
STACKS = named("stack")
PADS = named("pad")
ROLLS = named("roll")
FLIPS = named("flip")
ITERATIONS = frozenset((Tensor.__iter__,))
RANKINGS = named("topk", "sort")
SCATTERS = named("scatter")
INDEX_COPIES = named("index_copy")

WRITES = INDEX_COPIES | named("setitem")
"""What writes one tensor into another."""

COPIES = frozenset((Tensor.copy_,))
CONVOLUTIONS = named(*(f"conv{kind}{dims}d" for kind in ("", "_transpose") for dims in (1, 2, 3)))
EINSUMS = named("einsum")
TENSORDOTS = named("tensordot")

PRODUCTS = {
    **dict.fromkeys(named("matmul", "mm", "bmm"), 0),
    **dict.fromkeys(named("baddbmm", "addmm"), 1),
    **dict.fromkeys((*EINSUMS, *TENSORDOTS), 0),
    **dict.fromkeys(named("linear", "inner", "cdist", "rmatmul"), 0),
}
"""What multiplies, and where the two factors begin among its tensors."""

PICKS = (
    CONVOLUTIONS
    | COPIES
    | named(*("getitem", "index_select", "gather", "take_along_dim", "rot90", "fliplr", "flipud", "scatter", "unfold"))
    | named("index_put", "index_copy", "index_add", "slice_scatter", "select_scatter", "sort", "topk", "masked_select")
)
"""What puts values where their place is not followed, or mixes neighbours."""

LAST_WITH_LAST = named("linear", "inner", "cdist")
"""Those that go along the last dimension of both."""

POOLS = named(
    *(f"{kind}_pool{dims}d" for kind in ("avg", "max", "adaptive_avg", "adaptive_max") for dims in (1, 2, 3)),
    "interpolate",
)
"""What keeps all but the last dimensions of an image."""

NORMS = named("norm")
"""Reductions whose dimension comes after the order."""

TOPS = named("topk")
LARGEST = named("amax")
EXPANSIONS = named("expand", "expand_as", "broadcast_to")
UNSQUEEZES = named("unsqueeze", "getitem")
MULTIPLICATIONS = named("mul", "multiply")

JOINS = CONCATENATIONS | STACKS | PADS | ROLLS | FLIPS
"""What puts values elsewhere, and leaves them as they are."""


@cache
def is_in_place(func: Function | None) -> bool:
    """Whether a function changes its first argument."""
    name = str(getattr(func, "__name__", ""))
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


RANDOM_LIKE = named("rand_like", "randn_like")
RANDOM = RANDOM_LIKE | named("rand", "randn", "bernoulli", "uniform")
LIKE = named("empty_like", "ones_like", "full_like", "zeros_like", "new_empty", "new_full", "new_ones")

WITHOUT_NAN = named("nan_to_num")
"""What changes no row that counts: one with NaN does not."""


# ---- products


@dataclass(frozen=True, slots=True)
class Product:
    """Factors, a name for each of their dimensions, and the names of the result's: a name in none of it is summed."""

    factors: tuple[Node, ...]
    names: tuple[tuple[Any, ...], ...]
    result: tuple[Any, ...]

    def own(self, which: int) -> list[int]:
        """The dimensions of one of two factors that the result has and the other factor has not."""
        other = self.names[1 - which]
        return [i for i, name in enumerate(self.names[which]) if name in self.result and name not in other]

    def shared(self, which: int) -> list[int]:
        """The dimensions of one of two factors that the result and the other factor have too."""
        other = self.names[1 - which]
        return [self.names[which].index(name) for name in self.result if name in other and name in self.names[which]]

    def summed(self, which: int) -> list[int]:
        """The dimensions of a factor that the result has not."""
        return [i for i, name in enumerate(self.names[which]) if name not in self.result]


def parameters_of(factor: Any) -> Any:
    """The parameter that a factor is a view of, and from where on; None for what is computed, perhaps at each call."""
    node = factor
    while isinstance(node, Node) and node.func is not None:
        node = node.sharing[0] if node.sharing else None
    return (node, factor.memory.offset) if isinstance(node, Node) else None


def is_of_table(logits: Node) -> bool:
    """Whether it is of no product, or of one with a table of positions or pairs: what is added to that of queries and
    keys. Of a table for each query one side has heads alone."""
    between = logits.label.between if logits.label else None
    if between is None or between.fixed:
        return True
    sides = [{root.learned for root in roots_of(between.of(side))} for side in (0, 1)]
    return {True} in sides


def product_of(node: Node) -> Product | None:
    """What a call multiplies; None where it is no product, or one of an unknown form."""
    func = node.func
    if func not in PRODUCTS:
        return None
    if func in EINSUMS:
        return _einsum(node)
    values = (*node.args, *(value for name, value in node.kwargs.items() if name != "out"))
    tensors = [value for value in values if isinstance(value, Node)][PRODUCTS[func] :]
    if len(tensors) < 2:
        return None
    left, right = (tensors[1], tensors[0]) if func is Tensor.__rmatmul__ else tensors[:2]
    if func in TENSORDOTS:
        return _tensordot(node, left, right)
    if func in LAST_WITH_LAST:
        return _last_with_last(func, left, right)
    return _matmul(left, right)


def _matmul(left: Node, right: Node) -> Product:
    """Batch dimensions are counted from the end, as they broadcast."""
    batch = [-1 - i for i in range(max(left.dims, right.dims) - 2)][::-1]
    of_left: list[Any] = ["rows", "summed"][-left.dims :]
    of_right: list[Any] = ["summed", "columns"][: right.dims]
    of_left = batch[len(batch) - max(left.dims - 2, 0) :] + of_left
    of_right = batch[len(batch) - max(right.dims - 2, 0) :] + of_right
    result = [*batch, *[name for name in ("rows", "columns") if name in of_left + of_right]]
    return Product((left, right), (tuple(of_left), tuple(of_right)), tuple(result))


def _last_with_last(func: Any, left: Node, right: Node) -> Product:
    mine: list[Any] = [f"left {i}" for i in range(left.dims - 1)]
    other: list[Any] = [f"right {i}" for i in range(right.dims - 1)]
    if func is torch.cdist:
        mine[:-1] = [-i for i in range(left.dims - 2, 0, -1)]
        other[:-1] = [-i for i in range(right.dims - 2, 0, -1)]
    own = [name for name in other if name not in mine]
    return Product((left, right), ((*mine, "summed"), (*other, "summed")), (*mine, *own))


def _tensordot(node: Node, left: Node, right: Node) -> Product | None:
    over = node.argument(2, "dims", 2)
    if isinstance(over, int):
        over = (list(range(-over, 0)), list(range(over)))
    if not (isinstance(over, tuple | list) and len(over) == 2 and all(isinstance(each, tuple | list) for each in over)):
        return None
    mine: list[Any] = [f"left {i}" for i in range(left.dims)]
    other: list[Any] = [f"right {i}" for i in range(right.dims)]
    for pair, (a, b) in enumerate(zip(*over, strict=True)):
        mine[a] = other[b] = f"summed {pair}"
    result = [name for name in (*mine, *other) if not name.startswith("summed")]
    return Product((left, right), (tuple(mine), tuple(other)), tuple(result))


def _einsum(node: Node) -> Product | None:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], list):
        operands = operands[0]
    if not isinstance(equation, str) or not all(isinstance(operand, Node) for operand in operands):
        return None
    inputs, _, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != len(operands):
        return None
    if "->" not in equation:
        once = [letter for letter in sorted(set(inputs) - {",", "."}) if inputs.count(letter) == 1]
        result = ("..." if "..." in inputs else "") + "".join(once)
    names = [_spelled(term, operand.dims) for term, operand in zip(terms, operands, strict=True)]
    pairs = zip(terms, operands, strict=True)
    most = max((operand.dims - len(term.replace("...", "")) for term, operand in pairs if "..." in term), default=0)
    return Product(tuple(operands), tuple(names), _spelled(result, most + len(result.replace("...", ""))))


def _spelled(term: str, dims: int) -> tuple[Any, ...]:
    """The letters of a term; dimensions of its ellipsis are counted from the end."""
    before, ellipsis, after = term.partition("...")
    more = dims - len(before) - len(after) if ellipsis else 0
    return (*before, *[-1 - i for i in range(more)][::-1], *after)
