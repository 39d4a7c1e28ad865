"""Host-side values: what leaves the device and reaches the rules and writers.

Nothing here knows about torch. A `Record` is everything that is known about one step.
"""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

_T = TypeVar("_T")
_KEPT = 8  # sets of tags: those of sampled steps, of the others, with and without validation


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

    def png(self) -> bytes:
        """The picture as a PNG file, without loss."""
        from PIL import Image as Pillow

        file = io.BytesIO()
        Pillow.fromarray(np.ascontiguousarray(self.pixels)).save(file, format="PNG", compress_level=1)  # twice as fast
        return file.getvalue()


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

Groups: TypeAlias = "Mapping[str, Sequence[tuple[str, str]]]"
"""Tags by what stands before their first slash, in order: what stands behind it, and the tag."""


@dataclass(frozen=True, slots=True)
class Record:
    """All values of one step, by tag.

    step counts completed optimizer steps from 1; wall_time is in seconds since the epoch.
    descriptions maps a tag's group (see `group_of`) to Markdown that says what the group measures.
    sampled: whether probes were due at the step. evidence: what diagnoses are decided by, which no writer stores.
    """

    step: int
    wall_time: float
    values: Mapping[str, Value]
    descriptions: Mapping[str, str] = field(default_factory=dict)
    sampled: bool = False
    evidence: Mapping[str, float] = field(default_factory=dict)
    groups: Groups | None = field(default=None, compare=False, repr=False)
    """Of the values, where they are known already."""

    def group(self, name: str) -> Sequence[tuple[str, str]]:
        """For each tag `<name>/<where>`, in order: where, and the tag."""
        first, _, inner = name.partition("/")
        found = (groups_of(self.values) if self.groups is None else self.groups).get(first, ())
        if not inner:
            return found
        return [(rest[len(inner) + 1 :], tag) for rest, tag in found if rest.startswith(f"{inner}/")]


@dataclass(frozen=True, slots=True)
class StepSnapshot:
    """What it takes to run a sampled step again: the random state at its beginning, and what the model was called with.

    shapes: of its tensors, by position or keyword.
    """

    step: int
    random_state: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


EVIDENCE = "torchprobe/evidence/"
"""Before the tag of a number that goes to `Record.evidence`; users of evidential networks log `evidence/...`."""
ONE_CLASS = "calibration_of_one_class"
"""Evidence that all targets of the training predictions have been of one class of two so far."""


class UserTag(str):
    """The tag of what the user logs, on its way to a record: equal to none of torchprobe's own, same text or not."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return type(other) is UserTag and str.__eq__(self, other)

    __hash__ = str.__hash__


def group_of(tag: str) -> str:
    """The tag's first component, without `val/`: `val/grad_norm/fc.weight` is in `grad_norm`."""
    return tag.removeprefix("val/").split("/", 1)[0]


def groups_of(tags: Iterable[str]) -> Groups:
    """Tags by group; those without a slash are in none."""
    found: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    for tag in tags:
        first, slash, rest = tag.partition("/")
        if slash:
            found[first].append((rest, tag))
    return dict(found)


def of_tags(find: Callable[[tuple[str, ...]], _T]) -> Callable[[tuple[str, ...]], _T]:
    """What is found of the tags of a step, which most steps have again: kept for the last few sets of tags."""
    return lru_cache(maxsize=_KEPT)(find)


def storable(value: object) -> Value | None:
    """The value as a record holds it, numbers as float; None for what no writer could store.

    Numbers are Python's, numpy's and anything of one element that `float` takes, such as a tensor on the host. Costs
    next to nothing for a float.
    """
    if type(value) is float:
        return value
    if isinstance(value, Histogram):
        edges, counts = value.edges, value.counts
        sound = _holds_numbers(edges, 1) and _holds_numbers(counts, 1) and len(edges) == len(counts) + 1
        return value if sound else None
    if isinstance(value, Image):
        pixels = value.pixels
        sound = _holds_numbers(pixels, 3) and pixels.dtype == np.uint8 and pixels.shape[2] == 3 and pixels.size > 0
        return value if sound else None
    if isinstance(value, np.ndarray):
        return value if _holds_numbers(value) else None
    if isinstance(value, Text):
        return value if isinstance(value.markdown, str) else None
    return number_of(value)


def is_tag(tag: object) -> bool:
    """Whether a value can be stored under it: text that is not empty, and that UTF-8 can hold."""
    return isinstance(tag, str) and bool(tag) and (tag.isascii() or not any("\ud800" <= c <= "\udfff" for c in tag))


def _holds_numbers(array: object, dimensions: int | None = None) -> bool:
    """Whether it is an array of real numbers, of so many dimensions."""
    return isinstance(array, np.ndarray) and array.dtype.kind in "fiub" and dimensions in (None, array.ndim)


def number_of(value: object) -> float | None:
    """What `float` makes of it; None for text, and for what is no single number."""
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    except OverflowError:  # a Python int beyond float64
        return (math.inf if value > 0 else -math.inf) if isinstance(value, int) else None
    except Exception:  # a tensor of several elements, a complex number
        return None
