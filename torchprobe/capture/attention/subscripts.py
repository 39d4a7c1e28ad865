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
