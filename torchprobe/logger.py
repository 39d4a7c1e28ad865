"""Logging by explicit calls: a session's steps with a manual clock, and its probes fed by hand."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchprobe.arguments import check_timeout
from torchprobe.buffer.decode import Decoder
from torchprobe.buffer.drain import Drain
from torchprobe.buffer.outlet import Outlet
from torchprobe.buffer.step import Piece, TransferBuffers
from torchprobe.capture.gate import Guard, Meter, no_autocast, protected
from torchprobe.logs import LogCalls
from torchprobe.messages import log as _log
from torchprobe.naming import ROOT, named_parameters
from torchprobe.probes.attention import AttentionWeights
from torchprobe.probes.base import Reporter
from torchprobe.probes.calibration import FLAGS, GIVEN, Calibration
from torchprobe.probes.evidence import EVIDENCE, SURE
from torchprobe.probes.gradients import Gradients
from torchprobe.probes.histograms import GradientHistograms, ParameterHistograms
from torchprobe.probes.learning_rates import LearningRates
from torchprobe.probes.schedule import as_schedule
from torchprobe.probes.uncertainty import Uncertainty
from torchprobe.records import Text, Value
from torchprobe.statistics import calibration, uncertainty
from torchprobe.statistics.dtypes import measurable
from torchprobe.steps.machine import StepMachine
from torchprobe.steps.open_step import OpenStep
from torchprobe.user_values import Number, attention_layers, checked, checked_predictions, decomposition
from torchprobe.writers.hparams import HParamsWriter, checked_hparams
from torchprobe.writers.run_directory import check_run_name, open_writer

_SLOTS = 2**18
_FLUSH_EVERY = 100  # steps
_FLUSH_SECONDS = _AT_EXIT_SECONDS = 30.0
_VALIDATION = "val"
_JUDGED = f"{SURE}|{GIVEN}|val"  # as of validation: calibration is not added up over steps


class TrainingLogger(LogCalls):
    """Logs what a training loop hands it, under the tags that `instrument` uses. A context manager: leaving it closes.

    Steps count from 1: what is logged before the first `increment_step()` belongs to step 1. With `prefix="val"` it
    belongs to the step that ended last, until something else is logged. No call waits, and none raises but for an
    argument that does not fit.

    Args:
        log_dir: where runs are, by default `runs`; experiment_name: this run's folder there, or `run_2`, ... in it when
            another run is there at the first write; overwrite: write over that one, as in `instrument`.
        log_gradients_every, log_histograms_every: cadences of `log_gradients` and `log_model_histograms`: 1, N, 2N, ...
        writer: instead of a directory: a `SummaryWriter`, or any `torchprobe.Writer`.

    Raises:
        TypeError, ValueError: for an argument that does not fit, such as an experiment_name with a path separator.
        OSError: when `log_dir` cannot be written.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None = None,
        experiment_name: str | None = None,
        log_gradients_every: int = 100,
        log_histograms_every: int = 500,
        *,
        writer: Any = None,
        overwrite: bool = False,
    ) -> None:
        if experiment_name is not None:
            check_run_name(experiment_name, "experiment_name")
        self._gradients_due = as_schedule("log_gradients_every", log_gradients_every)
        self._histograms_due = as_schedule("log_histograms_every", log_histograms_every)
        run, opened = open_writer(writer, log_dir, experiment_name, "experiment", overwrite=overwrite)
        super().__init__(HParamsWriter(opened), run)
        decoder = Decoder(LearningRates.descriptions)
        self._drain = Drain(self._sink, decoder, _FLUSH_SECONDS)
        self._steps = _Steps(Outlet(TransferBuffers(_SLOTS), self._drain, decoder, _FLUSH_EVERY))
        self._rates, self._norms = LearningRates().reporter(), Gradients().reporter()
        self._histograms = GradientHistograms().reporter(), ParameterHistograms().reporter()
        self._attention, self._uncertainty = AttentionWeights().reporter(), Uncertainty().reporter()
        self._calibration = Calibration().reporter()
        self._said: set[str] = set()
        self._finalizer = weakref.finalize(self, self._steps.close, _AT_EXIT_SECONDS)

    @property
    def global_step(self) -> int:
        """Completed steps; what is logged now belongs to the next one."""
        return self._steps.clock.completed

    def increment_step(self) -> None:
        """End the running step: the last call of an iteration."""
        self._steps.next_step()

    def log_learning_rate(self, optimizer: Optimizer) -> None:
        """`lr/<Optimizer>/group_<i>` of every group; momentum and weight decay when they change."""
        found = checked("optimizer", optimizer, Optimizer)
        self._write("log_learning_rate", lambda step: step.put_all(self._rates.observe(found)))

    def log_gradients(self, model: nn.Module) -> None:
        """Norms of the gradients as they are: call it after `backward()` and clipping. Writes at its cadence alone."""
        root = checked("model", model, nn.Module)
        if self._gradients_due(self._steps.clock.following):
            self._write("log_gradients", lambda step: _put(step, root, self._norms))

    def log_model_histograms(self, model: nn.Module) -> None:
        """Histograms of parameters, and of gradients where there are any. Writes at its cadence alone."""
        root = checked("model", model, nn.Module)
        if self._histograms_due(self._steps.clock.following):
            self._write("log_model_histograms", lambda step: _put(step, root, *self._histograms))

    def log_attention_stats(self, weights: Any, name: str = "attention", prefix: str = "") -> None:
        """Entropy, largest probability, sink and distance; `attention_collapse/<name>` is 1 below 0.1 nats in a head.

        weights: probabilities, (batch, heads, queries, keys), or a list or dict of these by layer, as models return
        them: `<name>.<layer>` are their names then. A key with probability 0 counts as not visible.
        """
        layers = list(attention_layers(weights, checked("name", name, str)))
        row = self._attention.probe.compute
        self._add("log_attention_stats", prefix, self._attention, lambda: [(at, row(layer)) for at, layer in layers])

    def log_uncertainty_metrics(
        self, epistemic: Any, aleatoric: Any = None, name: str = ROOT, prefix: str = ""
    ) -> None:
        """Uncertainty of each example, any shape: mean and histogram. Calls of a step add up.

        `uncertainty_epistemic/<name>`, `_aleatoric/`, and of both their sum, `_total/`.
        """
        parts, where = decomposition(epistemic, aleatoric), f"{SURE}||{checked('name', name, str)}"
        self._add("log_uncertainty_metrics", prefix, self._uncertainty, lambda: [(where, _uncertainty_row(parts))])

    def log_calibration(self, probs: Any, targets: Any, prefix: str = "") -> None:
        """`calibration/ece`, `mce`, `brier`, `nll`, `accuracy`, ... of tensors or arrays. Calls of a step add up.

        probs: (..., classes), adding up to 1, and targets: (...) class numbers, -100 for ignored ones; or a binary
        task's probabilities of class 1 with targets of the same shape, from 0 to 1. Logits are counted as invalid.
        Pictures: with a prefix, else as histograms.
        """
        p, y = checked_predictions(probs, targets)
        pictures = bool(checked("prefix", prefix, str)) or self._histograms_due(self._steps.clock.following)
        self._add("log_calibration", prefix, self._calibration, lambda: [(_JUDGED, _calibration_row(p, y, pictures))])

    def log_hparams(self, hparams: Mapping[str, Any], metrics: Mapping[str, Number] | None = None) -> None:
        """Hyperparameters (bools, numbers, strings) and metrics beside them: the HParams page, and a table as text."""
        lines = [f"| {name} | `{value}` |" for name, value in checked_hparams(hparams).items()]
        table = Text("\n".join(["| hyperparameter | value |", "| --- | --- |", *lines]))
        values = [*self._metrics.tagged({} if metrics is None else metrics, ""), ("hparams", table)]
        self._sink.begin(hparams)
        self._log("log_hparams", values, _VALIDATION)

    def flush(self, timeout: float | None = None) -> bool:
        """Write everything so far, waiting up to `timeout` seconds or as long as it takes. True when it is on disk."""
        check_timeout(timeout)
        if os.getpid() != self._steps.guard.pid or not self._finalizer.alive:
            return False
        self._steps.write()
        return self._drain.flush(timeout)

    def close(self, timeout: float | None = None) -> bool:
        """Write what is left and end the thread; False when something is unwritten: a second call waits for it."""
        check_timeout(timeout)
        self._finalizer.detach()
        return self._steps.close(timeout)

    def __enter__(self) -> TrainingLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._sink.failed = kind is not None
        self.close()

    def _log(self, call: str, values: Sequence[tuple[str, Value | Tensor]], prefix: str = "") -> None:
        self._write(call, lambda step: step.put_all(values), prefix)

    def _log_rows(self, call: str, piece: Piece) -> None:
        self._write(call, lambda step: step.replace(piece), _VALIDATION)

    def _add(
        self, call: str, prefix: str, reporter: Reporter, rows: Callable[[], Iterable[tuple[str, Tensor]]]
    ) -> None:
        """Rows of shape (several, fields) of each name, together with those of earlier calls."""
        start = f"{prefix}/" if checked("prefix", prefix, str) else ""

        def fill(step: OpenStep) -> None:
            for name, some in rows():
                step.add(Piece(reporter, [name] * len(some), some, start), reporter.probe.combine)

        self._write(call, fill, prefix)

    def _write(self, call: str, fill: Callable[[OpenStep], None], prefix: str = "") -> None:
        """Let `fill` put values into the step that they belong to; what it raises ends this call alone."""
        step = self._steps.open(checked("prefix", prefix, str))
        if step is None:
            if not self._finalizer.alive:
                self._say(call, f"{call} after close() is ignored")
            return
        try:
            with torch.no_grad(), no_autocast(torch.device("cpu")), no_autocast(torch.device("cuda")):
                fill(step)
        except Exception:
            self._say(call, f"{call} failed and its values are left out; training goes on", exc_info=True)

    def _say(self, call: str, message: str, exc_info: bool = False) -> None:
        if call not in self._said:
            self._said.add(call)
            _log.warning(message, exc_info=exc_info)


class _Steps:
    """The step that is open: the one that ended last, until something of the running one is logged.

    So validation between two steps belongs to the first of them, and what comes before everything else to step 0.
    """

    def __init__(self, outlet: Outlet) -> None:
        self.guard = Guard(Meter(), outlet.drain.stopped)
        self.clock = StepMachine()
        self.clock.training_pass()  # step 1 runs from the beginning
        self.current = OpenStep(0)
        self._outlet = outlet

    @protected
    def open(self, prefix: str = "") -> OpenStep:
        """The step that what has this prefix belongs to; None once nothing is recorded any more, or in a fork."""
        if self.current.number != self.clock.number and prefix.split("/", 1)[0] != _VALIDATION:
            self.write()
            self.current = OpenStep(self.clock.number)
        return self.current

    def next_step(self) -> None:
        """The running step ends; one of which nothing was logged is a step, too."""
        self.open()
        self.clock.next_step()

    @protected
    def write(self) -> None:
        """Hand over what the open step has so far."""
        self._outlet.hand_over(self.current.number, self.current.take())

    def close(self, timeout: float | None) -> bool:
        """Write everything and end the thread. False when something was left unwritten."""
        if os.getpid() != self.guard.pid:  # a child has no drain thread, and not its own file
            return True
        self.write()
        self.guard.stop()
        return self._outlet.drain.close(timeout)


def _put(step: OpenStep, model: nn.Module, *reporters: Reporter) -> None:
    """A row of each gradient or parameter, those of one device together; of two calls in a step the later counts."""
    for reporter in reporters:
        tensors = _tensors(model, reporter.source)
        for device in dict.fromkeys(tensor.device for tensor in tensors.values()):
            group = {name: tensor for name, tensor in tensors.items() if tensor.device == device}
            step.replace(Piece(reporter, list(group), reporter.probe.compute_all(list(group.values()))))


def _tensors(model: nn.Module, source: str) -> dict[str, Tensor]:
    """What parameters or their gradients hold now; of a sparse gradient the stored values, duplicates summed."""
    held = ((name, p if source == "parameters" else p.grad) for name, p in named_parameters(model))
    dense = {name: t.coalesce().values() if t.layout is torch.sparse_coo else t for name, t in held if t is not None}
    return {name: tensor.detach() for name, tensor in dense.items() if measurable(tensor)}


def _uncertainty_row(parts: uncertainty.Decomposition) -> Tensor:
    """Of a batch; no evidence is needed for what the user says it is."""
    row = uncertainty.compute(parts)
    return torch.cat((row, row.new_zeros(len(EVIDENCE))))[None]


def _calibration_row(probs: Tensor, targets: Tensor, pictures: bool) -> Tensor:
    row = calibration.handed_in(probs, targets)
    flags = [row.new_full((1,), float(pictures or flag != "pictures")) for flag in FLAGS]
    return torch.cat((row, row.new_zeros(len(EVIDENCE)), *flags))[None]
