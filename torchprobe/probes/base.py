"""The extension point: what a probe is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.records import Value
from torchprobe.schedule import Schedule, as_schedule

Source: TypeAlias = Literal[
    "outputs",
    "output_gradients",
    "gradients",
    "parameters",
    "updates",
    "attention",
    "loss",
    "uncertainty",
    "calibration",
    "flow",
    "units",
]
SOURCES: tuple[Source, ...] = get_args(Source)

Report: TypeAlias = "Iterable[tuple[str, Value]]"

Way: TypeAlias = Literal["combine", "append"]
"""How rows of one name from several ranks become those of the whole: merged by the probe, or listed side by side."""


class Probe:
    """What to capture, which statistic of it, under which tags, and how often.

    A subclass names its `source` and the `fields` of its statistic, and writes `compute` and `report`:

    - ``source``: ``"outputs"`` or ``"output_gradients"`` of modules; ``"gradients"`` (the ones that the
      optimizer is about to use), ``"parameters"`` or ``"updates"`` (after the optimizer's step).
    - ``compute(tensor)`` runs on the device, in the training thread: it returns one value per field and
      never reads a value back (`.item()`, `.cpu()`, `if tensor`), for that would stall the GPU.
    - ``combine(a, b)`` merges the statistics of two parts, such as two micro-batches of a step, the batches of
      two ranks, or two shards of a parameter.
    - ``report(name, values)`` runs on the host, in a background thread, and yields ``(tag, value)``.

    every: a number of steps, or a schedule `step -> bool`.
    Raises TypeError or ValueError for any other cadence, and for a subclass without `source` or `fields`.
    """

    source: ClassVar[Source]
    fields: ClassVar[tuple[str, ...]]
    descriptions: Mapping[str, str] = {}
    """Markdown for TensorBoard by tag group: for `saturated/fc1` the group is `saturated`."""
    default_every: ClassVar[int] = 100
    over_batches: ClassVar[Way] = "combine"
    """For ranks that see different examples."""
    over_shards: ClassVar[Way] = "combine"
    """For ranks that hold parts of one module and see the same examples; equal rows count once."""
    found_everywhere: ClassVar[bool] = True
    """Whether any model in training has what the probe watches: seeing nothing is worth a warning, asked for or not."""

    def __init__(self, every: int | Schedule | None = None) -> None:
        self.every = every
        self.schedule: Schedule = as_schedule("every", self.default_every if every is None else every)
        check_probe_class(type(self))

    @property
    def name(self) -> str:
        """How messages and summaries call the probe."""
        return type(self).__name__

    @property
    def width(self) -> int:
        """How many values `compute` returns."""
        return len(self.fields)

    def parts(self) -> tuple[Probe, ...]:
        """The probes that this one stands for: itself, unless it watches several sources."""
        return (self,)

    def compute(self, tensor: Tensor) -> Tensor:
        """The statistic of one tensor: shape (len(fields),), on the tensor's device."""
        raise TypeError(f"{self.name} defines neither compute(tensor) nor compute_all(tensors)")

    def compute_all(self, tensors: Sequence[Tensor], before: Sequence[Tensor] = ()) -> Tensor:
        """The statistics of many tensors of one device: shape (len(tensors), len(fields)).

        before: for source "updates" alone, the same parameters before the step; these copies are the
        probe's to overwrite, until it returns.
        """
        return torch.stack([self.compute(tensor) for tensor in tensors])

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        """Merge the statistics of two parts, shape (len(fields),) each. The default adds them."""
        return a + b

    def combine_rows(self, a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        """`combine` for many rows at once, on the host: shapes (names, fields). Merges what ranks have seen."""
        if type(self).combine is Probe.combine:
            return a + b
        pairs = zip(torch.from_numpy(a), torch.from_numpy(b), strict=True)
        return np.stack([self.combine(x, y).numpy() for x, y in pairs]) if len(a) else a

    def learn(self, names: Sequence[str], rows: NDArray[np.float64]) -> None:
        """On a rank that sends its rows to another one and reports none: what it may learn from them for itself."""

    def unscale(self, rows: Tensor, scale: Tensor) -> Tensor:
        """Source "output_gradients" under GradScaler: rows as they are for gradients divided by `scale`.

        rows has shape (modules, len(fields) + 1), its last column to be left as it is. The default
        changes nothing, so that the statistic is that of the scaled loss.
        """
        return rows

    def report(self, name: str, values: Mapping[str, float]) -> Report:
        """Tags and values for one module or parameter."""
        raise TypeError(f"{self.name} defines neither report(name, values) nor report_all(names, rows)")

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """Tags and values of a whole step; rows has shape (len(names), len(fields))."""
        for name, row in zip(names, rows.tolist(), strict=True):
            yield from self.report(name, dict(zip(self.fields, row, strict=True)))


def check_probe_class(cls: type[Probe]) -> None:
    """Raise a TypeError that says what a probe class lacks."""
    source = getattr(cls, "source", None)
    if source not in SOURCES:
        raise TypeError(f"{cls.__name__}.source is {source!r}; takes one of {', '.join(map(repr, SOURCES))}")
    fields = getattr(cls, "fields", None)
    if not isinstance(fields, tuple) or not fields or not all(isinstance(f, str) for f in fields):
        raise TypeError(f"{cls.__name__}.fields is {fields!r}; takes a tuple of names, one per value of compute()")
