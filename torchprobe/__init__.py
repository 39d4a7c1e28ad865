"""One line shows what happens inside a PyTorch model while it trains.

    session = torchprobe.instrument(model, log_dir="runs/exp1")

Public names are imported when they are first used, so that `import torchprobe` stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchprobe._version import __version__ as __version__

if TYPE_CHECKING:  # `as` says to type checkers that a name is public
    from torchprobe import integrations as integrations
    from torchprobe import random_state as random_state
    from torchprobe import statistics as statistics
    from torchprobe import testing as testing
    from torchprobe.capture.source import register_source as register_source
    from torchprobe.checkpoint import CheckpointManager as CheckpointManager
    from torchprobe.logger import TrainingLogger as TrainingLogger
    from torchprobe.probes.activations import ActivationGradients as ActivationGradients
    from torchprobe.probes.activations import Activations as Activations
    from torchprobe.probes.attention import Attention as Attention
    from torchprobe.probes.base import Probe as Probe
    from torchprobe.probes.base import Reporter as Reporter
    from torchprobe.probes.calibration import Calibration as Calibration
    from torchprobe.probes.gradients import Gradients as Gradients
    from torchprobe.probes.histograms import Histograms as Histograms
    from torchprobe.probes.learning_rates import LearningRates as LearningRates
    from torchprobe.probes.loss import Loss as Loss
    from torchprobe.probes.parameters import Parameters as Parameters
    from torchprobe.probes.parameters import Updates as Updates
    from torchprobe.probes.provenance import Provenance as Provenance
    from torchprobe.probes.schedule import every as every
    from torchprobe.probes.schedule import window as window
    from torchprobe.probes.uncertainty import Uncertainty as Uncertainty
    from torchprobe.probes.unit_activity import UnitActivity as UnitActivity
    from torchprobe.records import Histogram as Histogram
    from torchprobe.records import Image as Image
    from torchprobe.records import Record as Record
    from torchprobe.records import Text as Text
    from torchprobe.rules.alert import Alert as Alert
    from torchprobe.rules.alert import TrainingAlert as TrainingAlert
    from torchprobe.rules.magnitudes import UpdateRatio as UpdateRatio
    from torchprobe.rules.magnitudes import VanishingGradient as VanishingGradient
    from torchprobe.rules.missing import NothingCaptured as NothingCaptured
    from torchprobe.rules.missing import Stalled as Stalled
    from torchprobe.rules.non_finite import NonFinite as NonFinite
    from torchprobe.rules.spikes import ExplodingGradient as ExplodingGradient
    from torchprobe.rules.spikes import GradNormSpike as GradNormSpike
    from torchprobe.rules.spikes import LossSpike as LossSpike
    from torchprobe.rules.spikes import Overfitting as Overfitting
    from torchprobe.rules.thresholds import AttentionCollapse as AttentionCollapse
    from torchprobe.rules.thresholds import AttentionLogitGrowth as AttentionLogitGrowth
    from torchprobe.rules.thresholds import DeadUnits as DeadUnits
    from torchprobe.rules.thresholds import Overconfidence as Overconfidence
    from torchprobe.rules.webhook import WebhookNotifier as WebhookNotifier
    from torchprobe.session import Session as Session
    from torchprobe.session import instrument as instrument
    from torchprobe.session import session_of as session_of
    from torchprobe.writers.event_file import EventFileWriter as EventFileWriter
    from torchprobe.writers.json_lines import JsonLinesWriter as JsonLinesWriter
    from torchprobe.writers.protocol import Writer as Writer

_HOMES = {
    "ActivationGradients": "probes.activations",
    "Activations": "probes.activations",
    "Alert": "rules.alert",
    "Attention": "probes.attention",
    "AttentionCollapse": "rules.thresholds",
    "AttentionLogitGrowth": "rules.thresholds",
    "Calibration": "probes.calibration",
    "CheckpointManager": "checkpoint",
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
    "Overfitting": "rules.spikes",
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
    "integrations": "integrations",
    "random_state": "random_state",
    "register_source": "capture.source",
    "session_of": "session",
    "statistics": "statistics",
    "testing": "testing",
    "window": "probes.schedule",
}

if not TYPE_CHECKING:  # who take the names from above
    __all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'torchprobe' has no attribute {name!r}")
    from importlib import import_module

    home = import_module(f"torchprobe.{_HOMES[name]}")
    globals()[name] = value = home if _HOMES[name] == name else getattr(home, name)
    return value


def __dir__() -> list[str]:
    return ["__version__", *_HOMES]
