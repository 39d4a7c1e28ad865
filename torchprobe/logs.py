"""What a training script tells a run by itself, beside what is captured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.buffer.step import Piece
from torchprobe.buffer.transfer import records_graph
from torchprobe.messages import log as _log
from torchprobe.records import Histogram, Text, UserTag, Value
from torchprobe.statistics import out_of_distribution
from torchprobe.steps.recorder import Recorder
from torchprobe.user_values import Metrics, Number, checked, checked_predictions, floats
from torchprobe.writers.hparams import HParamsWriter
from torchprobe.writers.run_directory import RunDirectory

_SEPARATION = (
    "AUROC: how often a score from outside the distribution is above one from inside, ties by half; 0.5 is chance "
    "(exact). And both sets of scores."
)


class LogCalls(ABC):
    """The calls that log values, of a session as of a `TrainingLogger`; these say which step the values belong to."""

    def __init__(self, sink: HParamsWriter, run: RunDirectory | None) -> None:
        self._sink = sink
        self._run = run
        self._metrics = Metrics()
        self._separation = Separation()

    @property
    def log_dir(self) -> Path | str | None:
        """The run's directory, a str if it is a URL; None for a writer that was handed over, and on ranks but 0.

        Settled at the first write: before it what was asked for, from then on maybe `run_2` in it.
        """
        return None if self._run is None else self._run.path

    def log_metrics(self, metrics: Mapping[str, Number], prefix: str = "") -> None:
        """Log numbers of this iteration under `<prefix>/<name>`, at every step, with the step's number.

        A value may be a device tensor of one element: it is copied on the device and read later, so that
        nothing waits. Of two values for one tag and step the later counts. A tensor of several elements
        is dropped with one warning. Raises TypeError for what is no number.
        """
        self._log("log_metrics", list(self._metrics.tagged(metrics, prefix)), prefix)

    def log_text(self, tag: str, text: str) -> None:
        """Log Markdown for TensorBoard's Text page, with the step's number."""
        self._log("log_text", [(checked("tag", tag, str), Text(checked("text", text, str)))])

    def log_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Hyperparameters that `instrument` was not given. TensorBoard keeps those of the run's first steps.

        Raises TypeError for a value that is no bool, number or string.
        """
        self._sink.begin(hparams)

    def log_ood(self, in_scores: Any, out_scores: Any, name: str = "ood") -> None:
        """Log how well a score separates data from outside the training distribution from data inside it.

        Scores are to be high outside, such as epistemic uncertainty: tensors or arrays of any shape. Tags, with the
        step's number: `ood/auroc`, the share of pairs in which the outside score is the higher one, ties by half
        (0.5 is chance), and the histograms `ood/in` and `ood/out`; another `name` stands in place of `ood`. Sorts
        the scores on their device, and nothing waits. Raises TypeError for what is no array of numbers.
        """
        if not isinstance(name, str):
            raise TypeError(f"name={name!r}: takes a string, such as 'ood', not {type(name).__name__}")
        if records_graph():
            return
        inside, outside = floats("in_scores", in_scores), floats("out_scores", out_scores)
        try:
            row = out_of_distribution.compute(inside, outside.to(inside.device, non_blocking=True))
        except Exception:
            _log.exception("log_ood failed and its scores are left out; training goes on")
        else:
            self._log_rows("log_ood", Piece(self._separation, [name], row[None]))

    @abstractmethod
    def _log(self, call: str, values: Sequence[tuple[str, Value | Tensor]], prefix: str = "") -> None:
        """Values of the running step, or of the one that has just ended. call: which one was made."""

    @abstractmethod
    def _log_rows(self, call: str, piece: Piece) -> None:
        """Rows of that step; the later ones of a name count."""


class Logs(LogCalls):
    """The calls of a session. Each belongs to the running step, or to the one that has just ended."""

    def __init__(self, recorder: Recorder, sink: HParamsWriter, run: RunDirectory | None) -> None:
        super().__init__(sink, run)
        self._recorder = recorder

    def log_predictions(self, probs: Any, targets: Any) -> None:
        """Log class probabilities and targets for calibration, in a loop whose targets torchprobe does not see.

        They count for the step and for training or validation as the model's last pass was, at every call, and
        replace what was found without a call. Tensors stay on their device, and nothing waits.

        probs: (..., classes), floating, adding up to 1; or of a binary task (...), the probability of class 1. Numpy
        arrays too. Rows that do not add up to 1 are left out and counted in `calibration/invalid`, with one warning,
        and so are all where most do not, as logits: apply `softmax(-1)` first. targets: (...) class numbers, -100 for
        ignored ones; or of the shape of probs, floating soft labels or one-hot rows. Raises TypeError for what is no
        array, ValueError for other shapes.
        """
        predictions, classes = checked_predictions(probs, targets)
        self._recorder.log_predictions(predictions, classes)

    def _log(self, call: str, values: Sequence[tuple[str, Value | Tensor]], prefix: str = "") -> None:
        for tag, value in values:
            self._recorder.log(UserTag(tag), value)

    def _log_rows(self, call: str, piece: Piece) -> None:
        self._recorder.log_rows(piece)


class Separation:
    """Rows of `out_of_distribution.compute` as `<name>/auroc` and two histograms, `<name>/in` and `<name>/out`."""

    def __init__(self) -> None:
        self.descriptions: Mapping[str, str] = {}

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """A row a name. What is not finite is counted beside it."""
        for name, row in zip(names, rows, strict=True):
            self.descriptions = {**self.descriptions, name.split("/", 1)[0]: _SEPARATION}
            for key, value in out_of_distribution.summarise(row).items():
                if key == "auroc" or (key.startswith("nonfinite") and value):
                    yield f"{name}/{key}", value
            for side, (edges, counts) in out_of_distribution.histograms(row).items():
                yield f"{name}/{side}", Histogram(edges, counts)
