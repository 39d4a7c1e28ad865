"""Products of tensors, whichever way they are written: which dimension of the factors and of the result is which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchprobe.capture.attention import functions as fn
from torchprobe.capture.attention.tape import Node


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

    def summed(self, which: int) -> list[int]:
        """The dimensions of a factor that the result has not."""
        return [i for i, name in enumerate(self.names[which]) if name not in self.result]


def product_of(node: Node) -> Product | None:
    """What a call multiplies; None where it is no product, or one of an unknown form."""
    func = node.func
    if func not in fn.PRODUCTS:
        return None
    if func in fn.EINSUMS:
        return _einsum(node)
    values = (*node.args, *(value for name, value in node.kwargs.items() if name != "out"))
    tensors = [value for value in values if isinstance(value, Node)][fn.PRODUCTS[func] :]
    if len(tensors) < 2:
        return None
    left, right = (tensors[1], tensors[0]) if func in fn.SWAPPED else tensors[:2]
    if func in fn.TENSORDOTS:
        return _tensordot(node, left, right)
    if func in fn.LAST_WITH_LAST:
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
    if func in fn.DISTANCES:
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
