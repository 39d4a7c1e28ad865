"""All sources of a session, as one: what fetches values from the model, and how the values of passes are gathered."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any
from weakref import ReferenceType

from torch import Tensor, nn
from torch.optim import Optimizer

from torchprobe.buffer.step import Piece
from torchprobe.buffer.transfer import may_record_graphs
from torchprobe.capture.activity import Routers, Units
from torchprobe.capture.attention.source import AttentionSource
from torchprobe.capture.backward import ScalerSearch
from torchprobe.capture.compiled.retrace import Retrace
from torchprobe.capture.diagnosis.source import DiagnosisSource
from torchprobe.capture.gate import Gate, Meter
from torchprobe.capture.in_place import InPlace
from torchprobe.capture.micro_gradients import MicroGradientSource
from torchprobe.capture.module_hooks import EagerHooks, Watcher
from torchprobe.capture.modules import OutputSource, Selection
from torchprobe.capture.nan_origin.check import NanCheck
from torchprobe.capture.nan_origin.value_trace import StepSnapshots, ValueTrace
from torchprobe.capture.parameters import ParameterSource
from torchprobe.capture.predictions.source import PredictionSource
from torchprobe.capture.source import Pass, Running, registered
from torchprobe.naming import named_modules
from torchprobe.probes.base import Reporter

_COMPILED = "the model's output is inside the compiled graph: instrument what torch.compile(model) returns"


class Sources:
    """What watches modules, parameters, attention, predictions and NaN; the recorder says when.

    nan_gate: of the check for NaN, when something asks where it comes from.
    """

    def __init__(
        self,
        model: ReferenceType[nn.Module],
        reporters: Sequence[Reporter],
        selection: Selection,
        meter: Meter,
        nan_gate: Gate | None,
    ) -> None:
        self.model = model
        self.in_place = InPlace([reporter for reporter in reporters if reporter.source == "gradients"])
        self.running = running = Running(meter, self.in_place)
        self.snapshots = StepSnapshots()
        self.parameters = ParameterSource(model, reporters, selection.parameters)
        self.predictions = PredictionSource(model, reporters, meter)
        self._micro = MicroGradientSource(model, reporters, selection.parameters)
        self._outputs = OutputSource(reporters, selection.wants_module, running)
        self._attention = [AttentionSource(model, r, running) for r in reporters if r.source == "attention"]
        self._traces = [ValueTrace(r) for r in reporters if r.source == "flow"]
        self._rates: list[Any] = [r for r in reporters if r.source == "optimizers"]
        self.diagnosis = DiagnosisSource(model, next((r for r in reporters if r.source == "diagnosis"), None))
        watchers: list[Watcher] = [
            *self._traces,
            *(Units(r, selection.covers) for r in reporters if r.source == "units"),
            *(Routers(r, selection.covers) for r in reporters if r.source == "routers"),
            *self.diagnosis.watchers,
            *(attention.masks for attention in self._attention),
        ]
        self._hooks = EagerHooks(model, watchers, running)
        self._own = [(make(model, mine), mine) for make, mine in registered(reporters)]
        self.nan_check = None if nan_gate is None else NanCheck(model, nan_gate)
        self._late = Retrace(model, running, looks=bool(self._attention))
        self._meter, self._armed_for = meter, tuple[Any, ...]()  # when, and for what
        self._opened = (False, frozenset[Reporter]())  # what was due in the step that was opened last
        self.armed = True
        """Whether hooks may be on that an idle pass does not want."""
        self.scaled = ScalerSearch()

    # ---- steps

    def open(
        self, step: int, due: frozenset[Reporter], due_in_validation: frozenset[Reporter], may_trace: bool
    ) -> frozenset[Reporter]:
        """A step is about to begin; the probes that it samples: those due, and a close look where NaN was seen.

        may_trace: hooks are to be there in any case, since compiled graphs see none that come later.
        """
        if self.nan_check is not None and self.nan_check.wanted and self.nan_check.looks(step):
            due |= {trace.reporter for trace in self._traces if not trace.reporter.gate.failed}
        if due or may_trace or self.armed or self._opened != (False, due_in_validation):
            self._open(step, due, due_in_validation, may_trace)
        return due

    def _open(
        self, step: int, due: frozenset[Reporter], due_in_validation: frozenset[Reporter], may_trace: bool
    ) -> None:
        running, tells = self.running, may_trace and self.running.in_parts  # tells whether passes come
        self._opened = (bool(due) or tells, due_in_validation)
        running.follow(tells or self._of_passes(due), self._of_passes(due_in_validation, attention=False))
        self.parameters.open()
        self.predictions.end_step()
        self.predictions.open(step, due)
        for attention in self._attention:
            attention.open(step, due)
        self.diagnosis.open(step, due)
        self._tell_own("open", step)
        self.arm(due, may_trace)
        if any(trace.reporter in due for trace in self._traces):
            self.snapshots.open(step)
        if may_record_graphs():
            self.in_place.open(step, due, self.model() if due or may_trace else None, self._outputs.watched())
        self.parameters.forget(due)

    def _of_passes(self, due: frozenset[Reporter], attention: bool = True) -> bool:
        return any(r.source in ("outputs", "output_gradients") or (attention and r.source == "attention") for r in due)

    def captured(self, method: str, args: tuple[Any, ...]) -> None:
        """The user captures a graph of the device, and this would have been called with these arguments."""
        if method == "enter":  # the model is called
            self.armed = True
            self._outputs.arm(True, named_modules(self.model()))
        elif method == "_before":  # an optimizer steps
            for reporter, named in self.parameters.of_captured(args[0]):
                self.in_place.add_gradients(reporter, named)

    def step_ended(self) -> None:
        """A sampled step is complete."""
        self._late.after_step()

    def settled(self, last: bool = False) -> Iterator[Piece]:
        """Rows of parameters, where steps have left them. last: no training pass has followed."""
        yield from self.parameters.settle(last)
        yield from self.diagnosis.rows() if self.diagnosis.watchers else ()

    # ---- forward passes

    def enter(self, passing: Pass, module: nn.Module, may_trace: bool) -> None:
        """A forward pass begins. may_trace: see `open`."""
        training = passing.training
        if self.in_place.used and training:
            self.in_place.saw_pass()
        if passing.due or self.armed or (may_trace and training):
            self._arm(passing.due, training, may_trace and training)
            for attention in self._attention:
                attention.enter(passing, module)
            self.predictions.enter(passing)
            self._tell_own("enter", passing, module)

    def arm(self, due: frozenset[Reporter], may_trace: bool) -> None:
        """Validation is over, and training may go on by calls that no hook of the model itself sees."""
        if self.armed or due or may_trace:
            self._arm(due, True, may_trace)

    def _arm(self, due: frozenset[Reporter], training: bool, may_trace: bool) -> None:
        before, self._armed_for = self._armed_for, (self._meter.starts[:1], due, training, may_trace)
        if self._meter.starts and before == self._armed_for:
            return  # by what has led here, with nothing of the user's in between
        self.armed = bool(due) or may_trace
        modules = named_modules(self.model() if self.armed else None)
        self._hooks.arm(due, training, modules)
        if may_trace or self._outputs.wants(due):
            self._outputs.arm(training, modules)
        else:
            self._outputs.disarm()
        for attention in self._attention:  # a hook inside nn.MultiheadAttention ends its fast path in evaluation
            attention.arm(training and self.armed, modules)
        if training and self.armed:
            self._late.before_pass()

    def leave(self, passing: Pass, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        """It has returned."""
        self._exit(passing)
        self.predictions.on_output(module, args, kwargs, output)
        self.diagnosis.leave(passing, module, args, kwargs, output)
        if passing.training and (phase := self.predictions.take()) is not None:
            passing.keep(self.predictions, [phase])
        self._tell_own("leave", passing, module, args, kwargs, output)

    def exit(self, passing: Pass) -> None:
        """It has raised."""
        if passing.due:
            self._exit(passing)

    def _exit(self, passing: Pass) -> None:
        self.predictions.leave()
        for attention in self._attention:
            attention.leave()
        self._take_attention(passing)
        self._tell_own("exit", passing)

    def take_from_graphs(self, passing: Pass) -> list[Pass]:
        """What a compiled function around the model has recorded: no hook of the root ran there."""
        self._take_attention(passing)
        return [passing] if passing.kept else []

    def _take_attention(self, passing: Pass) -> None:
        for attention in self._attention:
            taken = attention.take()
            if taken is not None:
                passing.keep(attention, taken)

    def recomputed(self, passing: Pass, output: Any) -> None:
        """A checkpoint has run the whole model again."""
        if passing.due:
            self.predictions.on_recomputed(output)

    # ---- backward passes

    def backward_begins(self, due: frozenset[Reporter], early: Collection[int]) -> None:
        """Before any gradient of a parameter, but for those of these identities."""
        self._micro.begin(due)
        self.parameters.backward_begins(due, early)
        self.diagnosis.backward_begins(due)

    def backward_ends(self, due: frozenset[Reporter]) -> dict[Any, Any]:
        """After all of them: what is kept of the backward pass itself."""
        self.diagnosis.backward_ends(due)
        rows = self._micro.end(due)
        return {self._micro: rows} if rows else {}

    def backward_ended(self, due: frozenset[Reporter]) -> None:
        """After all that others do at its end."""
        self.parameters.backward_ended(due)

    def merge(self, a: dict[Any, Any], b: dict[Any, Any]) -> dict[Any, Any]:
        """What two passes kept, together."""
        for source, kept in b.items():
            a[source] = self._try(source, "merge", a[source], kept, default=kept) if source in a else kept
        return a

    def rows(
        self, kept: Mapping[Any, Any], training: bool, due: frozenset[Reporter], scale: float | Tensor | None = None
    ) -> list[Piece]:
        """What passes kept, as rows for the buffer. scale: what the loss was multiplied with."""
        pieces: list[Piece] = []
        for source, found in kept.items():
            if source is self._outputs:
                pieces += self._outputs.rows(found, training, due, scale)
            elif source is self._micro:
                pieces += self._micro.rows(found, scale)
            elif isinstance(source, ValueTrace):
                self.snapshots.saw(found.shapes)
                pieces += source.rows(found, training, due)
            else:
                pieces += self._try(source, "rows", found, training, due, default=[])
        for attention in self._attention:
            if attention.reporter in due and attention not in kept:
                attention.saw_nothing(training)
        if due and training and self.running.compiled:
            self.predictions.explain(_COMPILED)
        return pieces

    def _tell_own(self, what: str, *arguments: Any) -> None:
        for source, _ in self._own:
            self._try(source, what, *arguments)

    def _try(self, source: Any, what: str, *arguments: Any, default: Any = None) -> Any:
        """Call a method of a source. One of a user's own that raises switches its probes off alone."""
        try:
            return getattr(source, what)(*arguments)
        except Exception as error:
            mine = [reporter for own, reporters in self._own if own is source for reporter in reporters]
            if not mine:
                raise
            for reporter in [reporter for reporter in mine if not reporter.gate.failed]:
                reporter.gate.fail(error)
            return default

    # ---- optimizers, NaN, the end

    def optimizer_values(self, optimizer: Optimizer, due: frozenset[Reporter]) -> list[tuple[str, float | Tensor]]:
        """Learning rates and the like of the step that an optimizer has just taken."""
        values: list[tuple[str, float | Tensor]] = []
        for reporter in self._rates:
            if reporter in due and not reporter.gate.failed:
                try:
                    values += reporter.observe(optimizer)
                except Exception as error:
                    reporter.gate.fail(error)
        return values

    def nan_seen(self) -> None:
        """A step used numbers that are not finite, or would have; for any thread."""
        if self.nan_check is not None:
            self.nan_check.seen()

    def uncovered_attention(self) -> list[str]:
        """What attention was not recorded, and how often."""
        return [f"{count} x {reason}" for source in self._attention for reason, count in source.uncovered.items()]

    def detach(self) -> None:
        """Take everything off the model."""
        for attention in self._attention:
            attention.detach()
        self._tell_own("detach")
        self._outputs.detach()
        self.predictions.detach()
        self._late.detach()
        self._hooks.disarm()
        self.in_place.detach()
