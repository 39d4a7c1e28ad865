"""One line shows what happens inside a PyTorch model while it trains.

    session = torchprobe.instrument(model, log_dir="runs/exp1")

Public names are imported when they are first used, so that `import torchprobe` stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchprobe._version import __version__

if TYPE_CHECKING:
    from torchprobe.checkpoint import CheckpointManager
    from torchprobe.probes.activations import ActivationGradients, Activations
    from torchprobe.probes.attention import Attention
    from torchprobe.probes.base import Probe
    from torchprobe.probes.gradients import Gradients
    from torchprobe.probes.histograms import Histograms
    from torchprobe.probes.learning_rates import LearningRates
    from torchprobe.probes.loss import Loss
    from torchprobe.probes.parameters import Parameters, Updates
    from torchprobe.records import Histogram, Image, Record, Text
    from torchprobe.schedule import every, window
    from torchprobe.session import Session, instrument, session_of
    from torchprobe.writers.event_file import EventFileWriter
    from torchprobe.writers.json_lines import JsonLinesWriter
    from torchprobe.writers.protocol import Writer

_HOMES = {
    "ActivationGradients": "probes.activations",
    "Activations": "probes.activations",
    "Attention": "probes.attention",
    "CheckpointManager": "checkpoint",
    "EventFileWriter": "writers.event_file",
    "Gradients": "probes.gradients",
    "Histogram": "records",
    "Histograms": "probes.histograms",
    "Image": "records",
    "JsonLinesWriter": "writers.json_lines",
    "LearningRates": "probes.learning_rates",
    "Loss": "probes.loss",
    "Parameters": "probes.parameters",
    "Probe": "probes.base",
    "Record": "records",
    "Session": "session",
    "Text": "records",
    "Updates": "probes.parameters",
    "Writer": "writers.protocol",
    "every": "schedule",
    "instrument": "session",
    "session_of": "session",
    "window": "schedule",
}

__all__ = [
    "ActivationGradients",
    "Activations",
    "Attention",
    "CheckpointManager",
    "EventFileWriter",
    "Gradients",
    "Histogram",
    "Histograms",
    "Image",
    "JsonLinesWriter",
    "LearningRates",
    "Loss",
    "Parameters",
    "Probe",
    "Record",
    "Session",
    "Text",
    "Updates",
    "Writer",
    "__version__",
    "every",
    "instrument",
    "session_of",
    "window",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'torchprobe' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"torchprobe.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
