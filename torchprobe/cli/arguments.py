"""Types for argparse that say what an option takes."""

from __future__ import annotations

import argparse
import math


def positive_int(text: str) -> int:
    """A whole number from 1."""
    return _int_between(text, 1, None)


def port_number(text: str) -> int:
    """A TCP port, 1 to 65535."""
    return _int_between(text, 1, 65535)


def seed_number(text: str) -> int:
    """A whole number that seeds every generator: 32 bits."""
    return _int_between(text, 0, 2**32 - 1)


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


def _int_between(text: str, low: int, high: int | None) -> int:
    takes = f"takes a whole number of at least {low}" if high is None else f"takes a whole number, {low} to {high}"
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{takes}, got {text!r}") from None
    if value < low or (high is not None and value > high):
        raise argparse.ArgumentTypeError(f"{takes}, got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes a number, got {text!r}") from None
