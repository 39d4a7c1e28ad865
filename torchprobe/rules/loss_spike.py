"""The loss jumps."""

from __future__ import annotations

from torchprobe.rules.reading import LOSS_TAGS
from torchprobe.rules.spike import Spike


class LossSpike(Spike):
    """The loss is over 6 standard deviations above the mean of its last 128 values (OLMo-core's stability monitor).

    The loss is `train/loss` or `loss`, as the user logs it, else `overview/loss`, which without a `loss` field in the
    model's output exists on sampled steps only. Silent until there are 128 values.
    """

    name = "loss_spike"
    tags = LOSS_TAGS
    what = "the loss"
