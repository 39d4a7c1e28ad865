"""Host-side values: what leaves the device and reaches the rules and writers.

Nothing here knows about torch. A `Record` is everything that is known about one step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Histogram:
    """Exact counts between edges.

    edges: float64 of shape (buckets + 1,), not decreasing. counts: int64 of shape (buckets,).
    """

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Text:
    """Markdown, shown in TensorBoard's Text page."""

    markdown: str


@dataclass(frozen=True, slots=True)
class Image:
    """An RGB picture: uint8 of shape (height, width, 3)."""

    pixels: NDArray[np.uint8]


HParam: TypeAlias = "bool | int | float | str"


@dataclass(frozen=True, slots=True)
class HParams:
    """The run's hyperparameters, for TensorBoard's HParams page; started is in seconds since the epoch."""

    values: Mapping[str, HParam]
    started: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the run ended, for TensorBoard's HParams page; ended is in seconds since the epoch."""

    success: bool
    ended: float


@dataclass(frozen=True, slots=True)
class Lines:
    """A chart with a line for every scalar whose tag fits one of the patterns (regular expressions)."""

    title: str
    patterns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Margin:
    """A chart of lines within a band: for each the tags of the line, of the lower and of the upper margin."""

    title: str
    series: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """Categories of charts by title, for TensorBoard's Custom Scalars page."""

    categories: Mapping[str, tuple[Lines | Margin, ...]]


Value: TypeAlias = "float | Histogram | Text | Image | NDArray[np.float32] | HParams | Outcome | Layout"
"""What a tag can hold at a step: a scalar, or one of the richer kinds. An array becomes a tensor summary."""


@dataclass(frozen=True, slots=True)
class Record:
    """All values of one step, by tag.

    step counts completed optimizer steps from 1; wall_time is in seconds since the epoch.
    descriptions maps a tag's group (see `group_of`) to Markdown that says what the group measures.
    sampled: whether probes were due at the step.
    """

    step: int
    wall_time: float
    values: Mapping[str, Value]
    descriptions: Mapping[str, str] = field(default_factory=dict)
    sampled: bool = False


def group_of(tag: str) -> str:
    """The tag's first component, without `val/`: `val/grad_norm/fc.weight` is in `grad_norm`."""
    return tag.removeprefix("val/").split("/", 1)[0]
