"""Logging by explicit calls: a thin face over the probes, buffers and writers."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from torchprobe import explicit
from torchprobe.explicit import checked
from torchprobe.logbook import VALIDATION, Logbook
from torchprobe.naming import ROOT
from torchprobe.probes.schedule import as_schedule
from torchprobe.records import Text
from torchprobe.user_values import Metrics, Number, checked_predictions
from torchprobe.writers.hparams import HParamsWriter
from torchprobe.writers.opening import check_run_name, open_writer


class TrainingLogger:
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
        self._run, opened = open_writer(writer, log_dir, experiment_name, "experiment", overwrite=overwrite)
        self._sink = HParamsWriter(opened)
        self._metrics, self._probes = Metrics(), explicit.Probes()
        self._book = Logbook(self._sink, self._probes.rates.descriptions)
        self._finalizer = weakref.finalize(self, self._book.close, 30.0)  # seconds, at exit

    @property
    def log_dir(self) -> Path | str | None:
        """The run's directory, settled at the first write; None when a writer was handed over."""
        return None if self._run is None else self._run.path

    @property
    def global_step(self) -> int:
        """Completed steps; what is logged now belongs to the next one."""
        return self._book.completed

    def increment_step(self) -> None:
        """End the running step: the last call of an iteration."""
        self._book.turn()

    def log_metrics(self, metrics: Mapping[str, Number], prefix: str = "") -> None:
        """Numbers, or device tensors of one element, under `<prefix>/<name>`. Of two for one step the later counts."""
        values = list(self._metrics.tagged(metrics, prefix))
        self._book.write("log_metrics", lambda page: page.put_all(values), prefix)

    def log_learning_rate(self, optimizer: Optimizer) -> None:
        """`lr/<Optimizer>/group_<i>` of every group; momentum and weight decay when they change."""
        found = checked("optimizer", optimizer, Optimizer)
        self._book.write("log_learning_rate", lambda page: page.put_all(self._probes.rates.observe(found)))

    def log_gradients(self, model: nn.Module) -> None:
        """Norms of the gradients as they are: call it after `backward()` and clipping. Writes at its cadence alone."""
        root = checked("model", model, nn.Module)
        if self._gradients_due(self.global_step + 1):
            self._book.write("log_gradients", lambda page: page.extend(self._probes.of_gradients(root)))

    def log_model_histograms(self, model: nn.Module) -> None:
        """Histograms of parameters, and of gradients where there are any. Writes at its cadence alone."""
        root = checked("model", model, nn.Module)
        if self._histograms_due(self.global_step + 1):
            self._book.write("log_model_histograms", lambda page: page.extend(self._probes.of_distributions(root)))

    def log_attention_stats(self, weights: Any, name: str = "attention", prefix: str = "") -> None:
        """Entropy, largest probability, sink and distance; `attention_collapse/<name>` is 1 below 0.1 nats in a head.

        weights: probabilities, (batch, heads, queries, keys), or a list or dict of these by layer, as models return
        them: `<name>.<layer>` are their names then. A key with probability 0 counts as not visible.
        """
        layers = list(explicit.attention_layers(weights, checked("name", name, str)))
        self._book.write("log_attention_stats", lambda page: self._probes.add_attention(page, layers, prefix), prefix)

    def log_uncertainty_metrics(
        self, epistemic: Any, aleatoric: Any = None, name: str = ROOT, prefix: str = ""
    ) -> None:
        """Uncertainty of each example, any shape: mean and histogram. Calls of a step add up.

        `uncertainty_epistemic/<name>`, `_aleatoric/`, and of both their sum, `_total/`.
        """
        parts, where = explicit.uncertainty_of(epistemic, aleatoric), checked("name", name, str)
        add = self._probes.add_uncertainty
        self._book.write("log_uncertainty_metrics", lambda page: add(page, parts, where, prefix), prefix)

    def log_calibration(self, probs: Any, targets: Any, prefix: str = "") -> None:
        """`calibration/ece`, `mce`, `brier`, `nll`, `accuracy`, ... of tensors or arrays. Calls of a step add up.

        probs: (..., classes), adding up to 1, and targets: (...) class numbers, -100 for ignored ones; or a binary
        task's probabilities of class 1 with targets of the same shape. Pictures: with a prefix, else as histograms.
        """
        p, y = checked_predictions(probs, targets)
        drawn, add = bool(prefix) or self._histograms_due(self.global_step + 1), self._probes.add_calibration
        self._book.write("log_calibration", lambda page: add(page, p, y, prefix, drawn), prefix)

    def log_text(self, tag: str, text: str) -> None:
        """Markdown for TensorBoard's Text page."""
        value = {checked("tag", tag, str): Text(checked("text", text, str))}
        self._book.write("log_text", lambda page: page.put_all(value.items()))

    def log_hparams(self, hparams: Mapping[str, Any], metrics: Mapping[str, Number] | None = None) -> None:
        """Hyperparameters (bools, numbers, strings) and metrics beside them: the HParams page, and a table as text."""
        values = [*self._metrics.tagged(metrics or {}, ""), ("hparams", explicit.table(hparams))]
        self._sink.begin(hparams)
        self._book.write("log_hparams", lambda page: page.put_all(values), VALIDATION)

    def flush(self, timeout: float | None = None) -> bool:
        """Write everything so far, waiting up to `timeout` seconds or as long as it takes. True when it is on disk."""
        return self._book.flush(timeout)

    def close(self, timeout: float | None = None) -> bool:
        """Write what is left and end the thread. Safe to call twice; False when something was left unwritten."""
        self._finalizer.detach()
        return self._book.close(timeout)

    def __enter__(self) -> TrainingLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._sink.failed = kind is not None
        self.close()
