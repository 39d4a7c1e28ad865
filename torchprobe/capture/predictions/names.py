"""What the name of an output's field says that it holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor

from torchprobe.capture.predictions.likelihood import STD, Spread

Quantity: TypeAlias = Literal["epistemic", "aleatoric", "total", "variance", "alpha", "kl"]

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_STD = {"std", "stds", "stdev", "stddev", "sigma", "sigmas", "logstd", "logsigma"}
_VARIANCE = {"variance", "variances", "var", "vars", "logvar", "logvars", "logvariance"}
_OTHERWISE = {"attention", "attn", "attentions", "loss", "losses", "target", "targets", "label", "labels", "weights"}
_QUANTITIES: Mapping[Quantity, set[str]] = {  # the first that fits counts
    "epistemic": {"epistemic"},
    "aleatoric": {"aleatoric"},
    "total": {"uncertainty", "uncertainties", "entropy", "entropies"},
    "variance": _STD | _VARIANCE,
    "alpha": {"alpha", "alphas", "evidence", "evidences"},
    "kl": {"kl", "kld"},
}
MEANS = {"mean", "means", "mu", "loc", "gamma", "prediction", "predictions", "pred", "preds"}
PROBABILITIES = {"probs", "probabilities", "probability"}


class Meaning(NamedTuple):
    """A quantity, and how to get it from the field's tensor; of a variance also what stands for it there."""

    quantity: Quantity
    convert: Callable[[Tensor], Tensor]
    spread: Spread


def meaning_of(field: str) -> Meaning | None:
    """What a field such as `epistemic_std`, `log_var` or `evidence` holds; None for any other name."""
    words = words_of(field)
    if words & _OTHERWISE:
        return None
    for quantity, names in _QUANTITIES.items():
        if words & names:
            return Meaning(quantity, *_conversion(words))
    return None


def words_of(field: str) -> set[str]:
    """The words of a name: `log_var`, `logVar` and `LogVar` are log and var."""
    return {word.lower() for word in _WORDS.findall(field)}


def _conversion(words: set[str]) -> tuple[Callable[[Tensor], Tensor], Spread]:
    """A variance from what is the logarithm of one, or a standard deviation; alpha from evidence."""
    logarithm = any(
        word == "log" or word in ("logvar", "logvars", "logvariance", "logstd", "logsigma") for word in words
    )
    squared = bool(words & _STD)
    if words & {"evidence", "evidences"}:
        return lambda x: x + 1, Spread()
    if logarithm:
        return (lambda x: (2 * x).exp(), Spread(2.0, 1.0)) if squared else (lambda x: x.exp(), Spread(1.0, 1.0))
    return (lambda x: x.square(), STD) if squared else (lambda x: x, Spread())
