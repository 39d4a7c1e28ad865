"""What one output says of its uncertainty, before any statistic: a distribution, named fields, or a tensor."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, distributions, nn
from torch.distributions import Distribution

from torchprobe.capture.outputs import main_tensor
from torchprobe.capture.predictions.likelihood import STD, Spread

Quantity: TypeAlias = Literal["epistemic", "aleatoric", "total", "variance", "alpha", "kl"]

_DEPTH = 2
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_STD = {"std", "stds", "stdev", "stddev", "sigma", "sigmas", "logstd", "logsigma"}
_VARIANCE = {"variance", "variances", "var", "vars", "logvar", "logvars", "logvariance"}
_LOGARITHMS = {"log", "logvar", "logvars", "logvariance", "logstd", "logsigma"}
_EVIDENCE = {"evidence", "evidences"}
_OTHERWISE = {"attention", "attn", "attentions", "loss", "losses", "target", "targets", "label", "labels", "weights"}
_MEANS = {"mean", "means", "mu", "loc", "gamma", "prediction", "predictions", "pred", "preds"}
_PROBABILITIES = {"probs", "probabilities", "probability"}
_QUANTITIES: Mapping[Quantity, set[str]] = {  # the first that fits counts
    "epistemic": {"epistemic"},
    "aleatoric": {"aleatoric"},
    "total": {"uncertainty", "uncertainties", "entropy", "entropies"},
    "variance": _STD | _VARIANCE,
    "alpha": {"alpha", "alphas"} | _EVIDENCE,
    "kl": {"kl", "kld"},
}
_DIVERGENCES = ("kl_loss", "kl_div", "kl_divergence")  # methods of bayesian-torch's layers, and others'
_OBSERVED = "The model returns a distribution of what is observed."
_LATENT = "The model returns a distribution of the latent function, without observation noise."


@dataclass(slots=True)
class Reading:
    """What an output says, each part in its own shape and detached; None is what it does not say.

    named: epistemic, aleatoric and total by their names. mean, variance: of a number's prediction; source: what gives
    the variance, still in the graph, and what it is to it. spread_of_means: its epistemic part, of a mixture.
    alpha: of a Dirichlet distribution, (..., classes). nu, beta: with alpha, of a normal-inverse-gamma one. kl: a
    divergence from the prior, one number. entropy: a differential one. plain: the tensor that may hold logits, still
    in the graph; form says what is known of it: "logits", "probabilities", "binary" or nothing.
    """

    named: dict[str, Tensor] = field(default_factory=dict)
    mean: Tensor | None = None
    mean_in_graph: Tensor | None = None
    variance: Tensor | None = None
    source: tuple[Tensor, Spread] | None = None
    spread_of_means: Tensor | None = None
    alpha: Tensor | None = None
    nu: Tensor | None = None
    beta: Tensor | None = None
    kl: Tensor | None = None
    entropy: Tensor | None = None
    plain: Tensor | None = None
    form: str = ""
    note: str = ""

    @property
    def says_something(self) -> bool:
        """Whether there is more than a plain tensor."""
        return bool(self.named) or any(x is not None for x in (self.variance, self.alpha, self.entropy, self.kl))


def read(output: Any, module: nn.Module | None = None) -> Reading:
    """What an output says. module: whose it is; one with Bayesian layers may return a divergence beside it."""
    distribution = _first_distribution(output)
    reading = _read_fields(dict(_fields_of(output))) if distribution is None else _read_distribution(distribution)
    if distribution is None and reading.plain is None and not reading.says_something:
        tensor = main_tensor(output)
        reading.plain = tensor if tensor is not None and not tensor.is_complex() else None
    if reading.kl is None and module is not None:
        reading.kl = _divergence_beside(module, output)
    return reading


# ---- named fields


class Meaning(NamedTuple):
    """A quantity, and how to get it from the field's tensor; of a variance also what stands for it there."""

    quantity: Quantity
    convert: Callable[[Tensor], Tensor]
    spread: Spread


def meaning_of(name: str) -> Meaning | None:
    """What a field such as `epistemic_std`, `log_var` or `evidence` holds; None for any other name."""
    words = _words_of(name)
    if words & _OTHERWISE:
        return None
    quantity = next((quantity for quantity, names in _QUANTITIES.items() if words & names), None)
    return None if quantity is None else Meaning(quantity, *_conversion(words))


def _words_of(name: str) -> set[str]:
    """The words of a name: `log_var`, `logVar` and `LogVar` are log and var."""
    return {word.lower() for word in _WORDS.findall(name)}


def _conversion(words: set[str]) -> tuple[Callable[[Tensor], Tensor], Spread]:
    """A variance from what is the logarithm of one, or a standard deviation; alpha from evidence."""
    if words & _EVIDENCE:
        return lambda x: x + 1, Spread()
    is_std = bool(words & _STD)
    if words & _LOGARITHMS:
        return (lambda x: (2 * x).exp(), Spread(2.0, 1.0)) if is_std else (lambda x: x.exp(), Spread(1.0, 1.0))
    return (lambda x: x.square(), STD) if is_std else (lambda x: x, Spread())


def _fields_of(output: Any, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Named floating tensors of a mapping, dataclass or named tuple, and of such inside it."""
    for name, part in _items(output):
        if isinstance(part, Tensor):
            if part.is_floating_point():
                yield name, part
        elif depth < _DEPTH:
            yield from _fields_of(part, depth + 1)


def _items(output: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(output, Mapping):
        yield from ((str(name), part) for name, part in output.items())
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        yield from zip(output._fields, output, strict=True)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        yield from ((entry.name, getattr(output, entry.name)) for entry in dataclasses.fields(output))


def _read_fields(fields: dict[str, Tensor]) -> Reading:
    reading = Reading()
    for name, tensor in fields.items():
        meaning = meaning_of(name)
        if meaning is not None:
            if meaning.quantity == "variance" and reading.source is None:
                reading.source = tensor, meaning.spread
            _put(reading, meaning.quantity, meaning.convert(_wide(tensor)))
    if reading.alpha is not None:
        reading.nu = _wide_or_none(_with_words(fields, {"nu", "v"}))
        reading.beta = None if reading.nu is None else _wide_or_none(_with_words(fields, {"beta"}))
    if reading.variance is not None:
        reading.mean_in_graph = _mean_for(fields, reading.variance)
        reading.mean = None if reading.mean_in_graph is None else reading.mean_in_graph.detach()
    if "logits" in fields:
        reading.plain, reading.form = fields["logits"], "logits"
    else:
        reading.plain = _with_words(fields, _PROBABILITIES, without="log")
        reading.form = "" if reading.plain is None else "probabilities"
    return reading


def _put(reading: Reading, quantity: Quantity, values: Tensor) -> None:
    """The first field of a kind counts; a divergence is one number."""
    if quantity in ("epistemic", "aleatoric", "total"):
        reading.named.setdefault(quantity, values)
    elif getattr(reading, quantity) is None and (quantity != "kl" or values.numel() == 1):
        setattr(reading, quantity, values)


def _mean_for(fields: Mapping[str, Tensor], variance: Tensor) -> Tensor | None:
    """The prediction that a variance belongs to: by its name, and of the same shape."""
    means = (x for name, x in fields.items() if _words_of(name) & _MEANS and meaning_of(name) is None)
    return next((x for x in means if x.shape == variance.shape), None)


def _with_words(fields: Mapping[str, Tensor], words: set[str], without: str = "") -> Tensor | None:
    found = (x for name, x in fields.items() if _words_of(name) & words and without not in _words_of(name))
    return next(found, None)


def _wide(tensor: Tensor) -> Tensor:
    """Detached, and in float32 or wider: a variance must not overflow."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _wide_or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _wide(tensor)


def _divergence_beside(module: nn.Module, output: Any) -> Tensor | None:
    """The scalar after an output, as in bayesian-torch: of a module without Bayesian layers it may be a loss."""
    if not isinstance(output, tuple | list) or len(output) != 2 or not isinstance(output[1], Tensor):
        return None
    is_bayesian = (callable(getattr(type(part), name, None)) for part in module.modules() for name in _DIVERGENCES)
    return _wide(output[1]) if output[1].numel() == 1 and any(is_bayesian) else None


# ---- distributions


def _first_distribution(output: Any) -> Distribution | None:
    parts = output if isinstance(output, tuple | list) else [output, *(part for _, part in _items(output))]
    return next((part for part in parts if isinstance(part, Distribution)), None)


def _read_distribution(found: Distribution) -> Reading:
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


def _of_number(found: Distribution) -> Reading:
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


def _entropy(found: Distribution, variance: Tensor) -> Tensor | None:
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
    axis = weights.dim() - 1
    weights = weights.reshape(*weights.shape, *[1] * (means.dim() - weights.dim()))
    centre = (weights * means).sum(axis, keepdim=True)
    return (weights * (means - centre).square()).sum(axis).detach()
