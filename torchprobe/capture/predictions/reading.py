"""What one output says of its uncertainty, before any statistic: a distribution, named fields, or a tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, distributions, nn
from torch.distributions import Distribution

from torchprobe.capture.outputs import fields_of, heads_beside, main_tensor, named_parts, tensors_in
from torchprobe.capture.predictions.targets import STD, Number, Spread, wide

Quantity: TypeAlias = Literal["epistemic", "aleatoric", "total", "variance", "alpha", "kl"]

_DEPTH = 2
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_STD = {"std", "stds", "stdev", "stddev", "sigma", "sigmas", "logstd", "logsigma"}
_VARIANCE = {"variance", "variances", "var", "vars", "logvar", "logvars", "logvariance"}
_LOGARITHMS = {"log", "logvar", "logvars", "logvariance", "logstd", "logsigma"}
_EVIDENCE = {"evidence", "evidences"}
_ENTROPY = {"entropy", "entropies"}
_ROUNDED = 1e-2
_OTHERWISE = {"attention", "attn", "attentions", "explained", "loss", "losses", "target", "targets", "label", "labels"}
_OTHERWISE |= {"weights"}
_MEANS = {"mean", "means", "mu", "loc", "gamma", "prediction", "predictions", "pred", "preds"}
_LOGITS = {"logits", "logit"}
_PROBABILITIES = {"probs", "probabilities", "probability"}
_QUANTITIES: Mapping[Quantity, set[str]] = {  # the first that fits counts
    "epistemic": {"epistemic"},
    "aleatoric": {"aleatoric"},
    "total": {"uncertainty", "uncertainties"} | _ENTROPY,
    "variance": _STD | _VARIANCE,
    "alpha": {"alpha", "alphas"} | _EVIDENCE,
    "kl": {"kl", "kld"},
}
_OF = {"data": "aleatoric", "model": "epistemic", "knowledge": "epistemic"}  # in a name that says uncertainty
_DIVERGENCES = ("kl_loss", "kl_div", "kl_divergence")  # methods of bayesian-torch's layers, and others'
_CODES = {"code", "codes", "decoded", "latent", "latents", "recon", "recons", "reconstruction", "reconstructions", "z"}
_GUESSES = _STD | _LOGARITHMS | {"alpha", "alphas"} | _EVIDENCE  # names of other things, too
_OBSERVED = "The model returns a distribution of what is observed."
_LATENT = "The model returns a distribution of the latent function, without observation noise."


@dataclass(frozen=True, slots=True)
class Reading:
    """What an output says, each part in its own shape and detached; None is what it does not say.

    named: epistemic, aleatoric and total by their names, of the examples that among chooses. numbers: ways to read it
    as a mean and a variance. alpha: of a Dirichlet distribution, (..., classes), and the field that it was made of,
    where that is but a guess. nu, beta: with alpha, of a normal-inverse-gamma one. kl: a divergence from the prior, one
    number. entropy: a differential one. plain: the tensor that may hold logits, still in the graph; form says what is
    known of it: "logits", "binary" or nothing. guesses: names of fields that a loss has to confirm. heads: outputs as
    good as the plain one, which is the first of them, by name.
    """

    named: Mapping[Quantity, Tensor] = field(default_factory=dict)
    among: Tensor | None = None
    numbers: tuple[Number, ...] = ()
    alpha: Tensor | None = None
    evidence: Tensor | None = None
    nu: Tensor | None = None
    beta: Tensor | None = None
    kl: Tensor | None = None
    entropy: Tensor | None = None
    plain: Tensor | None = None
    form: str = ""
    note: str = ""
    guesses: tuple[str, ...] = ()
    heads: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def says_something(self) -> bool:
        """Whether there is more than a plain tensor and what is guessed of it."""
        known = any(number.key == "" for number in self.numbers) or (self.alpha is not None and self.evidence is None)
        return bool(self.named) or known or self.entropy is not None or self.kl is not None


def read(output: Any, module: nn.Module | None = None) -> Reading:
    """What an output says. module: whose it is; one with Bayesian layers may return a divergence beside it."""
    found = _distributions(output)
    reading = _read_distribution(found[0]) if found else _read_fields(dict(fields_of(output)))
    if len(found) > 1:
        reading = replace(reading, note=f"{reading.note} It is the first of {len(found)} in the output.".strip())
    if not found and reading.plain is None and not reading.says_something:
        numbers, heads = reading.numbers or _pair(output), reading.heads or heads_beside(output)
        reading = replace(reading, plain=_main(output), numbers=numbers, heads=heads)
    if reading.kl is None and module is not None:
        reading = replace(reading, kl=_divergence_beside(module, output))
    return reading


def _main(output: Any) -> Tensor | None:
    tensor = main_tensor(output)
    return None if tensor is None or tensor.is_complex() else tensor


def _pair(output: Any) -> tuple[Number, ...]:
    """Two tensors of one shape, which may be a mean and what tells its spread, in any of four ways."""
    parts = output if isinstance(output, tuple | list) and len(output) == 2 else ()
    usable = [isinstance(part, Tensor) and part.is_floating_point() and part.dim() > 0 for part in parts]
    if not parts or not all(usable) or parts[0].shape != parts[1].shape:
        return ()
    ways = [meaning_of(name) for name in ("variance", "log_var", "std", "log_std")]
    return tuple(Number(f"second {i}", parts[0], parts[1], w.spread, w.convert) for i, w in enumerate(ways) if w)


# ---- named fields


class Meaning(NamedTuple):
    """A quantity, and how to get it from the field's tensor; of a variance also what stands for it there."""

    quantity: Quantity
    convert: Callable[[Tensor], Tensor]
    spread: Spread
    is_guess: bool


def meaning_of(name: str) -> Meaning | None:
    """What a field such as `epistemic_std`, `log_var` or `evidence` holds; None for any other name."""
    words = _words_of(name)
    words |= {_OF.get(word, "") for word in words} if words & {"uncertainty", "uncertainties"} else set()
    quantity = next((quantity for quantity, names in _QUANTITIES.items() if words & names), None)
    if quantity is None or words & (_OTHERWISE | _LOGITS):
        return None
    return Meaning(quantity, *_conversion(words), quantity in ("variance", "alpha") and bool(words & _GUESSES))


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


def _read_fields(tensors: dict[str, Tensor]) -> Reading:
    fields = {name: x for name, x in tensors.items() if x.is_floating_point()}
    meanings = {name: meaning for name in fields if (meaning := meaning_of(name)) is not None}
    if any(_words_of(name) & _CODES for name in fields):  # a variance may be the code's
        meanings = {name: m._replace(is_guess=m.is_guess or m.quantity == "variance") for name, m in meanings.items()}
    found: dict[Quantity, tuple[str, Tensor]] = {}
    for name, meaning in meanings.items():  # the first field of a kind counts; a divergence is one number
        if fields[name].numel() == 1 if meaning.quantity == "kl" else _fits(name, meaning, fields):
            found.setdefault(meaning.quantity, (name, fields[name]))
    values = {quantity: _proper(name, meanings[name].convert(wide(x))) for quantity, (name, x) in found.items()}
    nu, beta = _with_words(fields, {"nu", "v"}), _with_words(fields, {"beta"})
    complete = nu is not None and beta is not None
    both = values.get("epistemic"), values.get("aleatoric")
    if "total" not in values and both[0] is not None and both[1] is not None and both[0].shape == both[1].shape:
        values["total"] = both[0] + both[1]
    named: dict[Quantity, Tensor] = {q: values[q] for q in ("epistemic", "aleatoric", "total") if q in values}
    plain = fields.get("logits", _with_words(fields, _PROBABILITIES, without="log"))
    return Reading(
        named=named,
        among=_among(tensors, [*named.values()]),
        numbers=_numbers(fields, *found["variance"], meanings) if "variance" in found else (),
        alpha=values.get("alpha"),
        evidence=None if complete or "alpha" not in found else found["alpha"][1],
        nu=wide(nu) if nu is not None and complete else None,
        beta=wide(beta) if beta is not None and complete else None,
        kl=values.get("kl"),
        plain=plain,
        guesses=tuple(name for name, meaning in meanings.items() if meaning.is_guess and not complete),
        heads=_heads(fields, plain, meanings),
    )


def _among(tensors: Mapping[str, Tensor], values: Sequence[Tensor]) -> Tensor | None:
    """Which values are of any example: those that a mask beside them names, if all others were set to 0."""
    shapes = {value.shape for value in values}
    mask = next((x for name, x in tensors.items() if "mask" in _words_of(name) and {x.shape} == shapes), None)
    if mask is None:
        return None
    chosen = mask != 0
    return chosen | torch.stack([(value.where(~chosen, 0) != 0).any() for value in values]).any()


def _fits(name: str, meaning: Meaning, fields: Mapping[str, Tensor]) -> bool:
    """Whether a field has a value for each example, as far as the others tell: none for a batch, or for a task. Among
    numbers alone, as the terms of a loss, it is of one example where its mean is there, too.
    """
    field, others = fields[name], [x for other, x in fields.items() if other != name and x.dim() > 0]
    if meaning.quantity in ("epistemic", "aleatoric"):
        return True
    if not others:
        return field.dim() > 0 or len(fields) == 1 or _mean_for(fields, field) is not None
    return field.dim() > 0 and any(x.shape[0] == field.shape[0] for x in others)


def _proper(name: str, values: Tensor) -> Tensor:
    """NaN where some are below 0 by more than rounding: no uncertainty is, but for an entropy of numbers."""
    largest = torch.linalg.vector_norm(values.nan_to_num(0.0, 0.0, 0.0), torch.inf)
    fine = ((values >= -_ROUNDED * largest) | values.isnan()).all()
    return values if _words_of(name) & _ENTROPY else values.where(fine, torch.nan)


def _numbers(
    fields: Mapping[str, Tensor], name: str, source: Tensor, meanings: Mapping[str, Meaning]
) -> tuple[Number, ...]:
    meaning, mean = meanings[name], _mean_for(fields, source)
    if meaning.is_guess and mean is None:
        return ()
    return (Number(name if meaning.is_guess else "", mean, source, meaning.spread, meaning.convert),)


def _heads(fields: Mapping[str, Tensor], plain: Tensor | None, known: Mapping[str, Meaning]) -> dict[str, Tensor]:
    """Fields that may be outputs as good as the first one: called logits, too, or of a model without known names."""
    free = {
        re.sub("[|@~]", "_", name): x for name, x in fields.items() if x.dim() > 1 and not _words_of(name) & _OTHERWISE
    }
    if plain is not None or known:
        free = {name: x for name, x in free.items() if x is plain or _words_of(name) & _LOGITS}
    return free if len(free) > 1 and (plain is None or any(x is plain for x in free.values())) else {}


def _mean_for(fields: Mapping[str, Tensor], variance: Tensor) -> Tensor | None:
    """The prediction that a variance belongs to: by its name, and of the same shape."""
    means = (x for name, x in fields.items() if _words_of(name) & _MEANS and meaning_of(name) is None)
    return next((x for x in means if x.shape == variance.shape), None)


def _with_words(fields: Mapping[str, Tensor], words: set[str], without: str = "") -> Tensor | None:
    return next((x for name, x in fields.items() if _words_of(name) & words and without not in _words_of(name)), None)


def _divergence_beside(module: nn.Module, output: Any) -> Tensor | None:
    """The scalar after an output, as in bayesian-torch: of a module without Bayesian layers it may be a loss."""
    if not isinstance(output, tuple | list) or len(output) != 2 or not isinstance(output[1], Tensor):
        return None
    is_bayesian = (callable(getattr(type(part), name, None)) for part in module.modules() for name in _DIVERGENCES)
    return wide(output[1]) if output[1].numel() == 1 and any(is_bayesian) else None


# ---- distributions


def _distributions(output: Any) -> list[Distribution]:
    parts = output if isinstance(output, tuple | list) else [output, *(part for _, part in named_parts(output))]
    return [part for part in parts if isinstance(part, Distribution)]


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
    if isinstance(found, distributions.VonMises):  # its variance is that of a direction, from 0 to 1
        return Reading(note=_OBSERVED)
    if isinstance(found, distributions.Dirichlet):
        return Reading(alpha=found.concentration.detach(), note=_OBSERVED)
    with torch.no_grad():
        return _of_number(found)


def _of_number(found: Distribution) -> Reading:
    # A likelihood is a module of its own in gpytorch: what a process returns is the function without the noise.
    note = _LATENT if type(found).__module__.startswith("gpytorch") else _OBSERVED
    try:
        mean, variance = found.mean, found.variance
    except NotImplementedError:
        return Reading(note=note)
    if isinstance(found, distributions.Normal):
        number = Number("", mean, found.scale, STD, torch.square)
    else:
        number = Number("", mean, variance, is_normal=False)
    return Reading(numbers=(number,), entropy=_entropy(found, variance.detach()), note=note)


def _entropy(found: Distribution, variance: Tensor) -> Tensor | None:
    if isinstance(found, distributions.MultivariateNormal | distributions.LowRankMultivariateNormal):
        return 0.5 * (2 * math.pi * math.e * variance).log()
    try:
        return found.entropy().detach()
    except (NotImplementedError, RuntimeError):  # no closed form; or one by automatic differentiation
        return None


def losses_in(output: Any) -> list[Tensor]:
    """Numbers among a model's outputs that may be its loss."""
    return [x for x in tensors_in(output) if x.dim() == 0 and x.is_floating_point()]
