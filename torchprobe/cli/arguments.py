"""What commands take: numbers and places; and what they raise when it cannot be done."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

_N = TypeVar("_N", int, float)


class CommandError(Exception):
    """A mistake in what was asked, or something the machine lacks: shown as one line, without a traceback.

    The message says what was wrong, what is taken instead, and how to put it right.
    """


def add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    about: str,
    description: str,
    examples: str,
) -> argparse.ArgumentParser:
    """The parser of a command, to add options to; `run` carries the command out and returns the exit code."""
    parser = commands.add_parser(
        name, help=about, description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


def number(kind: Callable[[str], _N], takes: str, fits: Callable[[_N], bool]) -> Callable[[str], _N]:
    """A type for argparse: what `kind` makes of the text, if it fits; takes: what does, in words."""

    def parsed(text: str) -> _N:
        try:
            value = kind(text)
        except ValueError:
            what = "a number" if kind is float else takes
            raise argparse.ArgumentTypeError(f"takes {what}, got {text!r}") from None
        if not fits(value):
            raise argparse.ArgumentTypeError(f"takes {takes}, got {text!r}")
        return value

    return parsed


positive_int = number(int, "a whole number of at least 1", lambda value: value >= 1)
port_number = number(int, "a whole number, 1 to 65535", lambda value: 1 <= value <= 65535)
# 32 bits, which seed every generator
seed_number = number(int, f"a whole number, 0 to {2**32 - 1}", lambda value: 0 <= value < 2**32)
positive_float = number(float, "a number above 0", lambda value: 0 < value < math.inf)
probability = number(float, "a number from 0 to below 1", lambda value: 0 <= value < 1)
