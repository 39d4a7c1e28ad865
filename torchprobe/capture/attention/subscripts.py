"""What an einsum equation does to the dimensions of its two operands."""

from __future__ import annotations


def is_summed(equation: str, position: int, axis: int) -> bool:
    """Whether an operand's dimension, counted from the end, is summed over."""
    letter, output = _letter(equation, position, axis)
    return letter is not None and letter not in output


def axis_in_output(equation: str, position: int, axis: int) -> int | None:
    """Where an operand's dimension is in the output, both counted from the end; None where it is not."""
    letter, output = _letter(equation, position, axis)
    return output.rindex(letter) - len(output) if letter is not None and letter in output else None


Roles = tuple[tuple[int, int], ...]
"""Which dimensions of a product can be (of queries, of keys), counted from the end."""

EITHER: Roles = ((-2, -1), (-1, -2))


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
