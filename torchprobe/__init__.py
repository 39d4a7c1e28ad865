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
    from torchprobe.probes.activations import UnitActivity as UnitActivity
    from torchprobe.probes.attention import Attention as Attention
    from torchprobe.probes.base import Probe as Probe
    from torchprobe.probes.base import Reporter as Reporter
    from torchprobe.probes.calibration import Calibration as Calibration
    from torchprobe.probes.diagnosis import Diagnosis as Diagnosis
    from torchprobe.probes.gradients import Gradients as Gradients
    from torchprobe.probes.gradients import OptimizerState as OptimizerState
    from torchprobe.probes.gradients import Parameters as Parameters
    from torchprobe.probes.gradients import Updates as Updates
    from torchprobe.probes.histograms import Histograms as Histograms
    from torchprobe.probes.learning_rates import LearningRates as LearningRates
    from torchprobe.probes.loss import Loss as Loss
    from torchprobe.probes.performance import Performance as Performance
    from torchprobe.probes.provenance import Provenance as Provenance
    from torchprobe.probes.routing import Routing as Routing
    from torchprobe.probes.schedule import every as every
    from torchprobe.probes.schedule import window as window
    from torchprobe.probes.uncertainty import Uncertainty as Uncertainty
    from torchprobe.records import Histogram as Histogram
    from torchprobe.records import Image as Image
    from torchprobe.records import Record as Record
    from torchprobe.records import Text as Text
    from torchprobe.rules.alert import Alert as Alert
    from torchprobe.rules.alert import TrainingAlert as TrainingAlert
    from torchprobe.rules.course import ExplodingGradient as ExplodingGradient
    from torchprobe.rules.course import GradNormSpike as GradNormSpike
    from torchprobe.rules.course import LossSpike as LossSpike
    from torchprobe.rules.course import NothingCaptured as NothingCaptured
    from torchprobe.rules.course import Overconfidence as Overconfidence
    from torchprobe.rules.layers import AttentionCollapse as AttentionCollapse
    from torchprobe.rules.layers import AttentionLogitGrowth as AttentionLogitGrowth
    from torchprobe.rules.layers import DeadUnits as DeadUnits
    from torchprobe.rules.layers import UpdateRatio as UpdateRatio
    from torchprobe.rules.layers import VanishingGradient as VanishingGradient
    from torchprobe.rules.non_finite import NonFinite as NonFinite
    from torchprobe.rules.progress import InputBound as InputBound
    from torchprobe.rules.progress import Overfitting as Overfitting
    from torchprobe.rules.progress import Stalled as Stalled
    from torchprobe.rules.webhook import WebhookNotifier as WebhookNotifier
    from torchprobe.session import Session as Session
    from torchprobe.session import instrument as instrument
    from torchprobe.session import session_of as session_of
    from torchprobe.writers.event_file import EventFileWriter as EventFileWriter
    from torchprobe.writers.json_lines import JsonLinesWriter as JsonLinesWriter
    from torchprobe.writers.protocol import Writer as Writer

_NAMES = {
    "capture.source": "register_source",
    "checkpoint": "CheckpointManager",
    "integrations": "integrations",
    "logger": "TrainingLogger",
    "probes.activations": "ActivationGradients Activations UnitActivity",
    "probes.attention": "Attention",
    "probes.base": "Probe Reporter",
    "probes.calibration": "Calibration",
    "probes.diagnosis": "Diagnosis",
    "probes.gradients": "Gradients OptimizerState Parameters Updates",
    "probes.histograms": "Histograms",
    "probes.learning_rates": "LearningRates",
    "probes.loss": "Loss",
    "probes.performance": "Performance",
    "probes.provenance": "Provenance",
    "probes.routing": "Routing",
    "probes.schedule": "every window",
    "probes.uncertainty": "Uncertainty",
    "random_state": "random_state",
    "records": "Histogram Image Record Text",
    "rules.alert": "Alert TrainingAlert",
    "rules.course": "ExplodingGradient GradNormSpike LossSpike NothingCaptured Overconfidence",
    "rules.layers": "AttentionCollapse AttentionLogitGrowth DeadUnits UpdateRatio VanishingGradient",
    "rules.non_finite": "NonFinite",
    "rules.progress": "InputBound Overfitting Stalled",
    "rules.webhook": "WebhookNotifier",
    "session": "Session instrument session_of",
    "statistics": "statistics",
    "testing": "testing",
    "writers.event_file": "EventFileWriter",
    "writers.json_lines": "JsonLinesWriter",
    "writers.protocol": "Writer",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}

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
