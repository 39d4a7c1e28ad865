"""What training or validation has gathered since it was last collected."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchprobe.capture.predictions.forms import Form
from torchprobe.capture.predictions.pool import Pool
from torchprobe.capture.predictions.predicted import Predicted
from torchprobe.capture.predictions.tally import Tally
from torchprobe.statistics.dtypes import row_dtype

MAX_WAITING = 16  # passes before one backward


@dataclass(slots=True, eq=False)
class Waiting:
    """A pass whose targets are not known yet. Holds what the rows that are read predict, never the output.

    predicted: by form. shape: of the plain output. nodes: of the graph, for what is computed from the output. mean,
    variance: a number's prediction.
    """

    predicted: dict[Form, Predicted]
    shape: tuple[int, ...]
    nodes: list[Any]
    pool: Pool
    mean: Tensor | None = None
    variance: Tensor | None = None
    judged: bool = False


@dataclass(slots=True)
class Phase:
    """Rows of uncertainty, calibration and interval coverage, and passes that are not complete."""

    training: bool
    uncertainty: Tally = field(default_factory=Tally)
    calibration: Tally = field(default_factory=Tally)
    coverage: Tally = field(default_factory=Tally)
    pools: dict[str, Pool] = field(default_factory=dict)
    waiting: list[Waiting] = field(default_factory=list)
    touched: bool = False  # a pass was seen
    unjudged: bool = False  # a plain output's targets were never seen

    def wait_for(self, waiting: Waiting) -> None:
        """Targets may follow. In validation nothing tells when they no longer can but the next pass."""
        if not self.training:
            self.forget_waiting()
        self.waiting = [*self.waiting[-MAX_WAITING + 1 :], waiting]

    def forget_waiting(self) -> None:
        """No targets will follow."""
        self.unjudged |= any(not waiting.judged for waiting in self.waiting)
        self.waiting = []

    def pool(self, fresh: Pool) -> Pool:
        """The pool for an input: that of the last pass, if it had the same."""
        last = self.pools.get(fresh.where)
        if last is not None and last.key is not None and fresh.key is not None and last.key.same_as(fresh.key):
            return last
        if last is not None:
            last.settle(self.uncertainty)
        self.pools[fresh.where] = fresh
        return fresh

    def settle(self) -> None:
        """The phase is over."""
        self.forget_waiting()
        for pool in self.pools.values():
            pool.settle(self.uncertainty)
        self.pools.clear()

    def support(self, key: str, evidence: Tensor) -> None:
        """What is known of a form counts for uncertainty and for calibration."""
        self.uncertainty.support(key, evidence)
        self.calibration.support(key, evidence)

    def settle_form(self, key: str, right: bool, certain: Tensor | None = None) -> None:
        """A loss has told whether an output has this form. certain: a flag on the device, where it may not have."""
        evidence = torch.tensor([1.0, float(right), 0.0], dtype=torch.float64)
        if certain is not None:
            evidence = evidence.to(certain.device, row_dtype(certain.device), non_blocking=True) * certain
        self.support(key, evidence)
