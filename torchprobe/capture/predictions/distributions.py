"""What a `torch.distributions` object says; gpytorch's are such objects."""

from __future__ import annotations

import math

import torch
from torch import Tensor, distributions

from torchprobe.capture.predictions.likelihood import STD
from torchprobe.capture.predictions.reading import Reading

_OBSERVED = "The model returns a distribution of what is observed."
_LATENT = "The model returns a distribution of the latent function, without observation noise."


def read_distribution(found: distributions.Distribution) -> Reading:
    """Mean, variance and entropy of each number that it is about; class probabilities where it is about classes.

    Of a joint normal distribution it is each number's own: nothing is factorised, whatever the number of points.
    """
    while isinstance(found, distributions.Independent):
        found = found.base_dist
    if isinstance(found, distributions.Categorical | distributions.OneHotCategorical):
        return Reading(plain=found.logits, form="logits", note=_OBSERVED)
    if isinstance(found, distributions.Bernoulli):
        return Reading(plain=found.logits, form="binary", note=_OBSERVED)
    if isinstance(found, distributions.Dirichlet):
        return Reading(alpha=found.concentration.detach(), note=_OBSERVED)
    with torch.no_grad():
        return _of_number(found)


def _of_number(found: distributions.Distribution) -> Reading:
    latent = type(found).__module__.startswith("gpytorch")
    # A likelihood is a module of its own in gpytorch: what a process returns is the function without the noise.
    reading = Reading(note=_LATENT if latent else _OBSERVED)
    try:
        reading.mean_in_graph, reading.variance = found.mean, found.variance.detach()
        reading.mean = reading.mean_in_graph.detach()
    except NotImplementedError:
        return reading
    if isinstance(found, distributions.Normal):
        reading.source = found.scale, STD
    if isinstance(found, distributions.MixtureSameFamily):
        reading.spread_of_means = _spread_of_means(found)
    reading.entropy = _entropy(found, reading.variance)
    return reading


def _entropy(found: distributions.Distribution, variance: Tensor) -> Tensor | None:
    if isinstance(found, distributions.MultivariateNormal | distributions.LowRankMultivariateNormal):
        return 0.5 * (2 * math.pi * math.e * variance).log()
    try:
        return found.entropy().detach()
    except (NotImplementedError, RuntimeError):  # no closed form; or one by automatic differentiation
        return None


def _spread_of_means(found: distributions.MixtureSameFamily) -> Tensor:
    """Variance of the components' means under the weights: what they disagree on."""
    weights: Tensor = found.mixture_distribution.probs
    means: Tensor = found.component_distribution.mean
    weights = weights.reshape(*weights.shape, *[1] * (means.dim() - weights.dim()))
    axis = found.mixture_distribution.probs.dim() - 1
    centre = (weights * means).sum(axis, keepdim=True)
    return (weights * (means - centre).square()).sum(axis).detach()
