"""A callback for HuggingFace's `Trainer`: `Trainer(..., callbacks=[TorchProbeCallback(every=50)])`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchprobe.session import Session, instrument

try:
    from transformers import TrainerCallback
except ImportError as missing:
    raise ImportError("TorchProbeCallback needs transformers: pip install transformers") from missing

_OF_EVALUATION = "eval_"


class TorchProbeCallback(TrainerCallback):
    """Watches the model from the start of `train` to its end, and records what the trainer logs.

    The trainer's numbers stand under `train/`, those of its evaluation under `val/`.
    options: those of `torchprobe.instrument`. Without a `log_dir` or `writer`, the run goes into the folder
    `torchprobe` of the trainer's output directory. The living session is `callback.session`.
    """

    def __init__(self, **options: Any) -> None:
        self.session: Session | None = None
        self._options = options

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Instrument the model."""
        options = dict(self._options)
        if options.get("writer") is None:
            options.setdefault("log_dir", Path(args.output_dir) / "torchprobe")
        self.session = instrument(model, **options)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Record the trainer's numbers."""
        if self.session is None or not logs:
            return
        numbers = {name: value for name, value in logs.items() if isinstance(value, int | float)}
        evaluated = {name for name in numbers if name.startswith(_OF_EVALUATION)}
        self.session.log_metrics({n: v for n, v in numbers.items() if n not in evaluated}, prefix="train")
        self.session.log_metrics({n.removeprefix(_OF_EVALUATION): numbers[n] for n in evaluated}, prefix="val")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Take everything off."""
        if self.session is not None:
            self.session.detach()
