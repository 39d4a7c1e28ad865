"""Whether a plain output is what its rows were computed for: decided on the host, from counts that come with them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

EVIDENCE = ("checked", "passed", "faint", "sampled")
"""Columns behind a row's statistics: gradient rows that were looked at; those of them that are a cross-entropy's;
those whose gradient was lost in rounding; and whether the statistics are over a sample."""

SURE = ""
"""The form of what needs no evidence."""

_ENOUGH = 0.9  # of the rows; those of another loss hardly pass, those of bfloat16 nearly all do

_FAINT = 0.01  # of the rows
_TOO_LUCKY = 20.0  # nats: a chance of 2e-9
_LUCKY, _UNSURE, _FEW = 1.0, 0.1, 4

Rows: TypeAlias = "Mapping[str, NDArray[np.float64]]"


class Evidence:
    """What has been decided about each form of the model's output; the last decision stays until there is another."""

    def __init__(self) -> None:
        self._decided: dict[str, bool] = {}

    def weigh(self, rows: Rows) -> None:
        """Decide on the forms of these rows, whose names begin with `<form>|`."""
        for name, row in rows.items():
            form, (checked, passed) = form_of(name), row[:2]
            if form != SURE and checked > 0:
                self._decided[form] = bool(passed >= _ENOUGH * checked)

    def holds(self, name: str) -> bool:
        """Whether a row counts."""
        form = form_of(name)
        return form == SURE or self._decided.get(form, False)

    @property
    def recognised(self) -> str | None:
        """The form that the output has, if it is but one. For any thread."""
        holding = [form for form, holds in self._decided.copy().items() if holds]
        return holding[0] if len(holding) == 1 else None

    @property
    def any(self) -> bool:
        """Whether the output was recognised as something."""
        return any(self._decided.values())


class Luck:
    """Whether predictions may be right for being their own targets: all of them from the first step on, and far more
    than those of a model that is as sure as that.
    """

    def __init__(self) -> None:
        self._nats = 0.0  # of having been right so far; infinite once a prediction was wrong
        self._right = 0.0

    def add(self, count: float, correct: float, nll: float) -> None:
        """More predictions: how many, how many right, and the sum of their negative log-likelihoods."""
        self._nats += nll if correct == count else math.inf
        self._right += correct

    @property
    def is_odd(self) -> bool:
        """Whether that is hardly chance. Of a few predictions less is enough, where each may well have been wrong."""
        unsure = self._right >= _FEW and self._nats > _UNSURE * self._right
        return (_LUCKY if unsure else _TOO_LUCKY) < self._nats < math.inf


def is_open(columns: NDArray[np.float64]) -> bool:
    """Whether too many rows lost their gradient, by the columns of `EVIDENCE`."""
    checked, _, faint, _ = columns
    return bool(faint > _FAINT * (checked + faint))


def form_of(name: str) -> str:
    """The form that a row's name begins with, and whose it is; `SURE` of any output."""
    form = name.partition("|")[0]
    return form if form.partition("@")[0] else SURE


def of_head(name: str, head: str) -> str:
    """The name of a row of another output than the first: `<form>@<head>|...`."""
    form, bar, rest = name.partition("|")
    return f"{form}@{head}{bar}{rest}"


def of_loop(name: str, loop: str) -> str:
    """The name of a row of one loop of a validation of several: `...~<loop>`."""
    return f"{name}~{loop}" if loop else name


def by_loop(names: Iterable[str], rows: NDArray[np.float64]) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Rows by name of all loops together, under "", and of each where there are several."""
    names = list(names)
    loops = {"": added_up([name.partition("~")[0] for name in names], rows)}
    for name, row in added_up(names, rows).items():
        name, _, loop = name.partition("~")
        loops.setdefault(loop, {})[name] = row
    return loops


def head_of(name: str) -> str:
    """Which output a row is of; nothing of the first."""
    return name.partition("|")[0].partition("@")[2]


def added_up(names: Iterable[str], rows: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """One row a name: several devices, or passes that were written apart, add up."""
    found: dict[str, NDArray[np.float64]] = {}
    for name, row in zip(names, rows, strict=True):
        found[name] = found[name] + row if name in found else row
    return found
