"""Hardly any gradient arrives at a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torchprobe.records import Record
from torchprobe.rules.alert import Alert
from torchprobe.rules.reading import Found, group, loss_of, not_finite, positive

_CONVERGED = 1e-3  # of the largest loss


class VanishingGradient:
    """A layer's mean absolute gradient is below `threshold`. Source: SageMaker Debugger.

    Healthy, and left alone: all layers below it when the loss has fallen below a thousandth of its largest (nothing is
    left to learn); a gradient of exactly zero at step 1 (weights that begin at zero, as in LoRA). Frozen layers have
    no gradient and no tag.
    """

    name = "vanishing_gradient"

    def __init__(self, threshold: float = 1e-7) -> None:
        self.threshold = positive("threshold", threshold)
        self._largest_loss = 0.0

    def state_dict(self) -> dict[str, Any]:
        """The largest loss seen, for a resumed run."""
        return {"largest_loss": self._largest_loss}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._largest_loss = float(state["largest_loss"])

    def __call__(self, record: Record) -> Found:
        """One alert a layer."""
        converged = self._has_converged(record)
        layers = dict(group(record, "grad_mean_abs"))
        if not layers or not_finite(record):
            return None
        low = {layer: mean for layer, mean in layers.items() if mean < self.threshold and (mean or record.step > 1)}
        if converged and len(low) == len(layers):
            return []
        message = "hardly any gradient arrives: the mean absolute gradient of the layer is below the threshold"
        return [Alert(self.name, record.step, layer, mean, self.threshold, message) for layer, mean in low.items()]

    def _has_converged(self, record: Record) -> bool:
        found = loss_of(record)
        if found is None or not math.isfinite(found[1]):
            return False
        loss = abs(found[1])
        self._largest_loss = max(self._largest_loss, loss)
        return loss < _CONVERGED * self._largest_loss
