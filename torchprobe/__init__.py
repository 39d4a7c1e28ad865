"""One line shows what happens inside a PyTorch model while it trains.

    session = torchprobe.instrument(model, log_dir="runs/exp1")

Public names are imported when they are first used, so that `import torchprobe` stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchprobe._version import __version__

if TYPE_CHECKING:
    from torchprobe.checkpoint import CheckpointManager
    from torchprobe.logger import TrainingLogger
    from torchprobe.probes.activations import ActivationGradients, Activations
    from torchprobe.probes.attention import Attention
    from torchprobe.probes.base import Probe, Reporter
    from torchprobe.probes.calibration import Calibration
    from torchprobe.probes.gradients import Gradients
    from torchprobe.probes.histograms import Histograms
    from torchprobe.probes.learning_rates import LearningRates
    from torchprobe.probes.loss import Loss
    from torchprobe.probes.parameters import Parameters, Updates
    from torchprobe.probes.provenance import Provenance
    from torchprobe.probes.schedule import every, window
    from torchprobe.probes.uncertainty import Uncertainty
    from torchprobe.probes.unit_activity import UnitActivity
    from torchprobe.records import Histogram, Image, Record, Text
    from torchprobe.rules.alert import Alert, TrainingAlert
    from torchprobe.rules.magnitudes import UpdateRatio, VanishingGradient
    from torchprobe.rules.missing import NothingCaptured, Stalled
    from torchprobe.rules.non_finite import NonFinite
    from torchprobe.rules.spikes import ExplodingGradient, GradNormSpike, LossSpike
    from torchprobe.rules.thresholds import AttentionCollapse, AttentionLogitGrowth, DeadUnits, Overconfidence
    from torchprobe.rules.webhook import WebhookNotifier
    from torchprobe.session import Session, instrument, session_of
    from torchprobe.writers.event_file import EventFileWriter
    from torchprobe.writers.json_lines import JsonLinesWriter
    from torchprobe.writers.protocol import Writer

_HOMES = {
    "ActivationGradients": "probes.activations",
    "Activations": "probes.activations",
    "Alert": "rules.alert",
    "Attention": "probes.attention",
    "CheckpointManager": "checkpoint",
    "Calibration": "probes.calibration",
    "AttentionCollapse": "rules.thresholds",
    "AttentionLogitGrowth": "rules.thresholds",
    "DeadUnits": "rules.thresholds",
    "EventFileWriter": "writers.event_file",
    "ExplodingGradient": "rules.spikes",
    "GradNormSpike": "rules.spikes",
    "Gradients": "probes.gradients",
    "Histogram": "records",
    "Histograms": "probes.histograms",
    "Image": "records",
    "JsonLinesWriter": "writers.json_lines",
    "LearningRates": "probes.learning_rates",
    "Loss": "probes.loss",
    "LossSpike": "rules.spikes",
    "NonFinite": "rules.non_finite",
    "NothingCaptured": "rules.missing",
    "Overconfidence": "rules.thresholds",
    "Parameters": "probes.parameters",
    "Probe": "probes.base",
    "Provenance": "probes.provenance",
    "Record": "records",
    "Reporter": "probes.base",
    "Session": "session",
    "Stalled": "rules.missing",
    "Text": "records",
    "TrainingAlert": "rules.alert",
    "TrainingLogger": "logger",
    "Uncertainty": "probes.uncertainty",
    "UnitActivity": "probes.unit_activity",
    "UpdateRatio": "rules.magnitudes",
    "Updates": "probes.parameters",
    "VanishingGradient": "rules.magnitudes",
    "WebhookNotifier": "rules.webhook",
    "Writer": "writers.protocol",
    "every": "probes.schedule",
    "instrument": "session",
    "session_of": "session",
    "window": "probes.schedule",
}

__all__ = [
    "ActivationGradients",
    "Activations",
    "Alert",
    "Attention",
    "AttentionCollapse",
    "AttentionLogitGrowth",
    "Calibration",
    "CheckpointManager",
    "DeadUnits",
    "EventFileWriter",
    "ExplodingGradient",
    "GradNormSpike",
    "Gradients",
    "Histogram",
    "Histograms",
    "Image",
    "JsonLinesWriter",
    "LearningRates",
    "Loss",
    "LossSpike",
    "NonFinite",
    "NothingCaptured",
    "Overconfidence",
    "Parameters",
    "Probe",
    "Provenance",
    "Record",
    "Reporter",
    "Session",
    "Stalled",
    "Text",
    "TrainingAlert",
    "TrainingLogger",
    "Uncertainty",
    "UnitActivity",
    "UpdateRatio",
    "Updates",
    "VanishingGradient",
    "WebhookNotifier",
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
