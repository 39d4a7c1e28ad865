"""A callback for Lightning's `Trainer`: `Trainer(callbacks=[TorchProbeCallback(every=50)])`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchprobe.session import Session, instrument

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as missing:
        raise ImportError("TorchProbeCallback needs Lightning: pip install lightning") from missing


class TorchProbeCallback(Callback):
    """Watches the module from the start of `fit` to its end, and records what it logs with `self.log`.

    options: those of `torchprobe.instrument`. Without a `log_dir` or `writer`, the run goes into the folder
    `torchprobe` of the trainer's own log directory. The living session is `callback.session`.
    """

    def __init__(self, **options: Any) -> None:
        self.session: Session | None = None
        self._options = options
        self._logged: dict[str, Any] = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Instrument the module."""
        options = dict(self._options)
        if options.get("writer") is None:
            options.setdefault("log_dir", Path(trainer.log_dir or trainer.default_root_dir) / "torchprobe")
        self.session = instrument(pl_module, **options)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Record what the training step logged."""
        self._log(trainer.logged_metrics)

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        """Record what the validation logged; not that of the sanity check, as in Lightning's own loggers."""
        if not trainer.sanity_checking:
            self._log(trainer.logged_metrics)

    def on_fit_end(self, *_: Any) -> None:
        """Take everything off."""
        if self.session is not None:
            self.session.detach()

    on_exception = on_fit_end

    def _log(self, metrics: dict[str, Any]) -> None:
        """Lightning keeps old values among the new; a new one is a new object."""
        new = {name: value for name, value in metrics.items() if self._logged.get(name) is not value}
        self._logged = dict(metrics)
        if self.session is not None:
            self.session.log_metrics(new)
