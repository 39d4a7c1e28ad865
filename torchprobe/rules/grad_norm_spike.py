"""The total gradient norm jumps."""

from __future__ import annotations

from torchprobe.rules.spike import Spike


class GradNormSpike(Spike):
    """The total gradient norm is over 6 standard deviations above the mean of its last 128 sampled values.

    Source: the stability monitor of OLMo-core. Silent until there are 128 values.
    """

    name = "grad_norm_spike"
    tags = ("overview/grad_norm",)
    what = "the total gradient norm"
