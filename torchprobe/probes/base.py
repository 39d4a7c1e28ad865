"""The extension point: what a probe is, and what one session makes of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.messages import log as _log
from torchprobe.probes import checks
from torchprobe.probes.checks import REDUCTIONS, Frozen, Reduce, Select
from torchprobe.probes.schedule import Cadence, Schedule, as_schedule
from torchprobe.records import Value

Report: TypeAlias = "Iterable[tuple[str, Value]]"
Rows: TypeAlias = "tuple[Sequence[str], NDArray[np.float64]]"
Way: TypeAlias = Literal["combine", "append"]
"""How rows of one name from several ranks become those of the whole: merged by the probe, or listed side by side."""
InValidation: TypeAlias = Literal["never", "first", "all"]


class Probe(metaclass=Frozen):
    """What to capture, which statistic of it, under which tags, and how often.

    It is configuration: one object serves any number of sessions, and cannot be changed once it is made. What a run
    adds up is kept by the `Reporter` that each session gets from `reporter()`.

    A subclass names its `source` and the `fields` of its statistic, writes `compute` and `report`, and says how parts
    are merged:

    - ``source``: ``"outputs"`` or ``"output_gradients"`` of modules; ``"gradients"`` (that the optimizer will use),
      ``"micro_gradients"`` (what each backward pass adds), ``"parameters"`` (after the optimizer's step), ``"updates"``
      (what it added to them); or several in a tuple: then ``compute`` sees the tensors of each, and ``report`` gets
      ``values[source][field]``, without a source that had nothing of the name.
    - ``compute(tensor)`` runs on the device, in the training thread: it returns one value per field and
      never reads a value back (`.item()`, `.cpu()`, `if tensor`), for that would stall the GPU.
    - ``reduce``, or ``combine(a, b)``, merges the statistics of two parts: two micro-batches of a step, calls of a
      module, the batches of two ranks, or two shards of a parameter. ``"sum"`` and ``"max"`` are of each field;
      ``"mean"`` weighs each part with the number of elements of the tensor it was computed of; ``"last"`` keeps the
      later part, of several ranks that of the highest.
    - ``report(name, values)`` runs on the host, in a background thread, and yields ``(tag, value)``.

    every: a number of steps, or a schedule `step -> bool`. select: which modules or parameters this probe alone
    watches, of those that include= and exclude= leave: name patterns with `*`, or a predicate `(name, module) -> bool`,
    `(name, parameter) -> bool`. A pattern also fits the parameters below a module. reduce: see above.
    Raises TypeError or ValueError for anything else, and for a subclass without `source` or `fields`.
    """

    source: ClassVar[str | tuple[str, ...]]
    fields: ClassVar[tuple[str, ...]]
    reduce: Reduce | None = None
    degrees: ClassVar[tuple[float, ...] | None] = None
    """With which power of the gradients each field grows: 1 of a norm, 2 of a sum of squares, 0 of a count. By these,
    rows of "output_gradients" and "micro_gradients" are as they are without a GradScaler, which multiplies the loss."""
    descriptions: Mapping[str, str] = {}
    """Markdown for TensorBoard by tag group: for `saturated/fc1` the group is `saturated`."""
    default_every: ClassVar[int] = 100
    dense_start: ClassVar[bool] = True
    """Whether the default cadence begins with 1, 2, 5, 10, 20 and 50, as far as they lie below it."""
    sampled: ClassVar[bool] = True
    """Whether it costs something: then a budget holds for it, and its steps count as sampled."""
    always: ClassVar[bool] = False
    """Whether `instrument(every=)` leaves its own cadence as it is."""
    over_batches: ClassVar[Way] = "combine"
    """For ranks that see different examples."""
    over_shards: ClassVar[Way] = "combine"
    """For ranks that hold parts of one module and see the same examples; equal rows count once."""
    combines_many: ClassVar[bool] = False
    """Whether `combine` takes rows of any shape (..., fields), and not one by one."""
    found_everywhere: ClassVar[bool] = True
    """Whether any model in training has what the probe watches: seeing nothing is worth a warning, asked for or not."""

    def __init__(
        self, every: int | Schedule | None = None, *, select: Select | None = None, reduce: Reduce | None = None
    ) -> None:
        checks.check_probe_class(type(self), checks.offered_sources())
        self.every = every
        usual = Cadence(self.default_every, self.dense_start and self.default_every > 2)
        self.schedule: Schedule = usual if every is None else as_schedule("every", every)
        self.select = None if select is None else checks.checked_select(self.name, self.sources, select)
        if reduce is not None:
            self.reduce = checks.checked_reduce(type(self), reduce, self.combines)

    def __setattr__(self, name: str, value: Any) -> None:
        if "_made" in self.__dict__:
            raise AttributeError(
                f"{self.name}.{name} cannot be set: a probe is configuration, and may serve several sessions; what one "
                "of them adds up belongs to the torchprobe.Reporter that reporter() returns"
            )
        super().__setattr__(name, value)

    @property
    def name(self) -> str:
        """How messages and summaries call the probe."""
        return type(self).__name__

    @property
    def sources(self) -> tuple[str, ...]:
        """The names in `source`."""
        return (self.source,) if isinstance(self.source, str) else tuple(dict.fromkeys(self.source))

    @property
    def width(self) -> int:
        """How many values a row holds: one for each field, and the number of elements where `reduce` is "mean"."""
        return len(self.fields) + self.weighted

    @property
    def weighted(self) -> bool:
        """Whether a number of elements stands behind the fields."""
        return self.reduce == "mean" and not self.combines

    @property
    def combines(self) -> bool:
        """Whether it has a `combine` of its own."""
        return type(self).combine is not Probe.combine

    @property
    def in_validation(self) -> InValidation:
        """Which batches of a validation pass it sees, after a sampled training step."""
        return "first" if "outputs" in self.sources else "never"

    def parts(self) -> tuple[Probe, ...]:
        """The probes that this one stands for: itself, unless it is made of several."""
        return (self,)

    def reporter(self) -> Reporter:
        """What one session makes of it: all running state lives there."""
        return Reporter(self)

    def selects(self, name: str, module_or_parameter: Any) -> bool:
        """Whether `select=` leaves it a module or parameter. Raises what a predicate of the user's raises."""
        return self.select is None or checks.selects(self.select, name, module_or_parameter)

    def compute(self, tensor: Tensor) -> Tensor:
        """The statistic of one tensor: shape (len(fields),), on the tensor's device."""
        raise TypeError(f"{self.name} defines neither compute(tensor) nor compute_all(tensors)")

    def compute_all(self, tensors: Sequence[Tensor], before: Sequence[Tensor] = ()) -> Tensor:
        """The statistics of many tensors of one device: shape (len(tensors), len(fields)).

        before: for "updates" alone, copies from before the step, which it may overwrite; `compute` sees differences.
        """
        seen = map(torch.sub, tensors, before) if before else tensors
        return torch.stack([checks.checked_row(self.name, self.compute(x), len(self.fields)) for x in seen])

    def measure(self, tensor: Tensor) -> Tensor:
        """What `compute` gives, with what merging needs behind it: shape (width,)."""
        row = checks.checked_row(self.name, self.compute(tensor), len(self.fields))
        return torch.cat((row, row.new_full((1,), tensor.numel()))) if self.weighted else row

    def measure_all(self, tensors: Sequence[Tensor], before: Sequence[Tensor] = ()) -> Tensor:
        """The same of `compute_all`: shape (len(tensors), width)."""
        rows = self.compute_all(tensors, before)
        if not self.weighted:
            return rows
        counts = [rows.new_full((1, 1), tensor.numel()) for tensor in tensors]  # a copied list would be waited for
        return torch.cat((rows, torch.cat(counts)), dim=1)

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        """Merge the rows of two parts, shape (len(fields),) each. By default as `reduce` says."""
        if self.reduce is None:
            raise TypeError(f"{self.name} has neither a combine(a, b) of its own nor a reduce")
        return REDUCTIONS[self.reduce](a, b)

    def combine_rows(self, a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        """`combine` for many rows at once, on the host: shapes (names, fields). Merges what ranks have seen."""
        if self.combines_many or not self.combines:
            return self.combine(torch.from_numpy(a), torch.from_numpy(b)).numpy()
        pairs = zip(torch.from_numpy(a), torch.from_numpy(b), strict=True)
        return np.stack([self.combine(x, y).numpy() for x, y in pairs]) if len(a) else a

    def led_by(self, schedule: Schedule) -> Schedule:
        """When it samples, if it has no `every` of its own, and `instrument(every=)` or `session.every` gives one."""
        return schedule

    def unscale(self, rows: Tensor, scale: Tensor) -> Tensor:
        """Rows of gradients of `scale` times the loss, as they are of the loss: by `degrees`, else as they came.

        rows: shape (n, width) or, of "output_gradients", (n, width + 1); what is behind the fields stays.
        """
        if self.degrees is None:
            return rows
        by = torch.stack([scale**degree for degree in self.degrees])
        return torch.cat((rows[:, : len(by)] / by, rows[:, len(by) :]), dim=1)

    def report(self, name: str, values: Mapping[str, Any]) -> Report:
        """Tags and values for one module or parameter."""
        raise TypeError(f"{self.name} defines neither report(name, values) nor report_all(names, rows)")

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """Tags and values of a whole step; rows has shape (len(names), len(fields))."""
        for name, row in zip(names, rows.tolist(), strict=True):
            yield from self.report(name, dict(zip(self.fields, row, strict=True)))

    def report_sources(self, values: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Report:
        """The same of a probe of several sources: values[name][source][field]."""
        for name, by_source in values.items():
            yield from self.report(name, by_source)


class Reporter:
    """What one session makes of a probe: its running state, and rows as tags and values, in the drain thread.

    A probe that learns in the course of a run returns a subclass from `reporter()`. The plan sets gate and schedule.
    """

    rows_suffice: ClassVar[bool] = True
    """Whether rows that give no tag mean that there was nothing to tell, and not that nothing was found."""

    def __init__(self, probe: Probe) -> None:
        self.probe, self.name, self.source = probe, probe.name, probe.sources[0]
        self.over_batches, self.over_shards = probe.over_batches, probe.over_shards
        self.found_everywhere, self.schedule = probe.found_everywhere, probe.schedule
        self.gate: Any = None
        self.reason = ""  # why nothing was found, when that is known
        self.remarks: list[str] = []
        self.descriptions: Mapping[str, str] = probe.descriptions
        self.beside: tuple[Reporter, ...] = ()
        """Reporters whose rows come with this one's."""

    @property
    def whole(self) -> Reporter:
        """The one that reports these rows: itself, unless the probe has several sources."""
        return self

    def by_source(self) -> tuple[Reporter, ...]:
        """One for each source, for captures to feed: itself, when there is but one."""
        sources = self.probe.sources
        return (self,) if len(sources) == 1 else tuple(SourceReporter(self, source) for source in sources)

    def begin(self, gate: Any, schedule: Schedule) -> None:
        """The session's plan says when to sample."""
        self.gate, self.schedule = gate, schedule

    def is_regular(self, step: int) -> bool:
        """Whether a sampled step is one of every N: not of a dense start, nor one that follows for an optimizer."""
        return not isinstance(self.schedule, Cadence) or step == 1 or step % self.schedule.steps == 0

    def explain(self, reason: str) -> None:
        """Why nothing can be found, as far as a capture knows."""
        self.reason = reason

    def remark(self, line: str, level: int = logging.WARNING) -> None:
        """What was looked at and not recorded, and what would settle it: said once, and in the session's summary."""
        if line and line not in self.remarks:
            self.remarks.append(line)
            _log.log(level, "%s", line)

    def learn(self, names: Sequence[str], rows: NDArray[np.float64]) -> None:
        """On a rank that sends its rows to another one and reports none: what it may learn from them for itself."""

    def combine_rows(self, a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        """What rows of the same names from two ranks are together."""
        return self.probe.combine_rows(a, b)

    def unscale(self, rows: Tensor, scale: Tensor) -> Tensor:
        """The rows of gradients of outputs or micro-batches for the loss divided by `scale`."""
        if self.probe.degrees is None and type(self.probe).unscale is Probe.unscale:
            self.remark(f"{self.probe.name} has no `degrees`: its {self.source} are of the loss times a scale")
        return self.probe.unscale(rows, scale)

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """Tags and values of a step; rows has shape (len(names), the probe's width)."""
        return self.probe.report_all(names, rows[:, :-1] if self.probe.weighted else rows)

    def report_sources(self, found: Mapping[str, Rows]) -> Iterator[tuple[str, Value]]:
        """The same, of several sources: names and rows by source."""
        values: dict[str, dict[str, Mapping[str, float]]] = {}
        for source, (names, rows) in found.items():
            for name, row in zip(names, rows.tolist(), strict=True):
                values.setdefault(name, {})[source] = dict(zip(self.probe.fields, row, strict=False))
        return iter(self.probe.report_sources(values))


class SourceReporter(Reporter):
    """One source of a probe that has several: its rows are reported with those of the others."""

    def __init__(self, whole: Reporter, source: str) -> None:
        super().__init__(whole.probe)
        self._whole, self.source = whole, source

    @property
    def whole(self) -> Reporter:
        """The one that reports."""
        return self._whole

    def learn(self, names: Sequence[str], rows: NDArray[np.float64]) -> None:
        """What the whole may learn."""
        self._whole.learn(names, rows)

    def combine_rows(self, a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        """As the whole does."""
        return self._whole.combine_rows(a, b)
