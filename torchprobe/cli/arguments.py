"""What commands take: numbers and places; and what they raise when it cannot be done."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from torchprobe.writers.places import as_url, is_url, local_path


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
        name,
        help=about,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """A type for argparse: a whole number from `low` to `high`."""
    takes = f"takes a whole number of at least {low}" if high is None else f"takes a whole number, {low} to {high}"

    def parsed(text: str) -> int:
        with suppress(ValueError):
            value = int(text)
            if value >= low and (high is None or value <= high):
                return value
        raise argparse.ArgumentTypeError(f"{takes}, got {text!r}")

    return parsed


positive_int = whole_number(1)
port_number = whole_number(1, 65535)
seed_number = whole_number(0, 2**32 - 1)  # 32 bits, which seed every generator


def positive_float(text: str) -> float:
    """A finite number above 0."""
    value = _number(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"takes a number above 0, got {text!r}")
    return value


def probability(text: str) -> float:
    """A number from 0 up to, but not including, 1."""
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"takes a number from 0 to below 1, got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes a number, got {text!r}") from None


def place(text: str) -> Path | str:
    """A folder, or a URL as it stands: for argparse."""
    return as_url(text) if is_url(text) else local_path(text)
