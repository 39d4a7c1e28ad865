"""The functions by which hand-written attention is recognised, and what they do to the dimensions of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Function = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]
Roles = tuple[tuple[int, int], ...]
"""Which dimensions of a product can be (of queries, of keys), counted from the end."""

EITHER: Roles = ((-2, -1), (-1, -2))

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


# ---- what a function does to a dimension, counted from the end


def from_the_end(dim: Any, dims: int) -> int | None:
    """A dimension as it is counted from the end; None for what is none."""
    if not isinstance(dim, int) or isinstance(dim, bool):
        return None
    return dim if dim < 0 else dim - dims


def is_over_last(args: Args, kwargs: Kwargs) -> bool:
    """Whether a sum is over the last dimension alone."""
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    last = args[0].dim() - 1 if args and isinstance(args[0], Tensor) else -1
    return dim in (-1, last, [-1], (-1,), [last], (last,))


def operands(func: Function, args: Args, kwargs: Kwargs) -> tuple[str | None, list[Tensor]]:
    """The two factors of a product, left one first, and the equation of an einsum."""
    values = [*args, *(value for name, value in kwargs.items() if name != "out")]
    equation = None
    if values and isinstance(values[0], str):
        equation, values = values[0], values[1:]
        if len(values) == 1 and isinstance(values[0], tuple | list):
            values = list(values[0])
    tensors = [value for value in values if isinstance(value, Tensor)][FIRST_OPERAND.get(func, 0) :]
    return equation, tensors[::-1] if func in SWAPPED else tensors


def moved(func: Function, args: Args, kwargs: Kwargs, before: Tensor, after: Tensor, axis: int) -> int | None:
    """Where the keys are after a function, counted from the end; None where they cannot be told."""
    if func in CONCATENATIONS:
        return None
    if func in PERMUTATIONS:
        return permuted(func, args, kwargs, before, axis)
    if after.shape == before.shape:
        return axis
    same_keys = after.dim() > 0 and after.size(-1) == before.size(-1)
    if axis == -1:
        return axis if same_keys or (func in INDEXING and after.dim() == before.dim()) else None
    return axis if axis == -2 and after.shape[-2:] == before.shape[-2:] else None


def permuted(func: Function, args: Args, kwargs: Kwargs, before: Tensor, axis: int) -> int:
    """Told by permuting a tensor all of whose sizes differ."""
    dummy = torch.empty(tuple(range(1, before.dim() + 1)), device="meta")
    swapped = (dummy if arg is before else arg for arg in args)
    after = func(*swapped, **{name: dummy if value is before else value for name, value in kwargs.items()})
    sizes: list[int] = list(after.shape)
    return sizes.index(dummy.size(axis)) - len(sizes)


# ---- what the equation of an einsum does


def is_summed(equation: str, position: int, axis: int) -> bool:
    """Whether an operand's dimension, counted from the end, is summed over."""
    letter, output = _letter(equation, position, axis)
    return letter is not None and letter not in output


def axis_in_output(equation: str, position: int, axis: int) -> int | None:
    """Where an operand's dimension is in the output, both counted from the end; None where it is not."""
    letter, output = _letter(equation, position, axis)
    return output.rindex(letter) - len(output) if letter is not None and letter in output else None


def roles(equation: str | None, learned: list[bool], dims: int) -> Roles:
    """What the dimensions of a product can be: each factor has one of its own, and either factor can be the keys.

    equation: None for a matrix product; learned: which factors are parameters; dims: of the factor with fewer.
    Parameters can be queries, and the keys are then the other factor's: a softmax over what parameters span chooses
    among them, as a router does. Empty where it is no attention.
    """
    if all(learned) or (equation is not None and not sums_over_shared(equation)):
        return ()
    if equation is None:
        return EITHER if not any(learned) else ((-2, -1),) if learned[0] and dims > 1 else ()
    left, right = _own(equation)
    pairs = [(left, right), (right, left)]
    if not any(learned) and None in (left, right):
        return ((-2, -1),)  # a query for each sequence
    return tuple((q, k) for (q, k), is_learned in zip(pairs, learned[::-1], strict=True) if q and k and not is_learned)


def _own(equation: str) -> tuple[int | None, int | None]:
    """The last dimension of the output, counted from the end, that only one of both operands has."""
    (left, right), output = _parsed(equation)
    axes = []
    for mine, others in ((left, right), (right, left)):
        own = [
            output.rindex(letter) - len(output)
            for letter in set(mine) - {"."}
            if letter in output and letter not in others
        ]
        axes.append(max(own, default=None))
    return axes[0], axes[1]


def sums_over_shared(equation: str) -> bool:
    """Whether it sums over a dimension that both operands have, as a matrix product does."""
    inputs, output = _parsed(equation)
    return len(inputs) == 2 and bool(set(inputs[0]) & set(inputs[1]) - {".", *output})


def _letter(equation: str, position: int, axis: int) -> tuple[str | None, str]:
    inputs, output = _parsed(equation)
    named = inputs[position].rpartition(".")[2]  # what an ellipsis stands for has no letters
    return (named[axis] if -axis <= len(named) else None), output


def _parsed(equation: str) -> tuple[list[str], str]:
    left, arrow, output = equation.replace(" ", "").partition("->")
    if not arrow:
        output = "".join(letter for letter in sorted(set(left) - {",", "."}) if left.count(letter) == 1)
    return left.split(","), output
