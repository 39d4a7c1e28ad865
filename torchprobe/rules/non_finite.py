"""NaN and inf, and where they came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torchprobe.records import Record, groups_of, of_tags
from torchprobe.rules.alert import Alert
from torchprobe.rules.base import BuiltIn, Found, group, scalar, texts

ORIGIN = "provenance"  # /module: Text that says what turned finite numbers into others
NO_MODULE = "(loss)"  # in place of a module's name: it happened outside the model

_SEEN = {  # tag group -> what it counts, in the order in which numbers go bad within a step
    "activation_nonfinite": "the module's output holds NaN or inf",
    "activation_grad_nonfinite": "the gradient of the module's output holds NaN or inf",
    "grad_nonfinite": "the gradient of the module's parameters holds NaN or inf",
    "gradients_nonfinite": "the gradient of the parameter holds NaN or inf",
    "parameters_nonfinite": "the parameter holds NaN or inf after the optimizer's step, though its gradient was finite",
}
_BACKWARD = ("activation_grad_nonfinite", "grad_nonfinite", "gradients_nonfinite")
_SIGNS = {  # what is looked at in every step
    "nonfinite/output": "the model's output is NaN, as seen at every step",
    "nonfinite/gradient": "gradients are NaN or inf while the model's output is not, as seen at every step",
    "nonfinite/parameter": "parameters are NaN or inf after the optimizer's step, as seen at every step",
}


class _Evidence(NamedTuple):
    where: str | None
    elements: float
    message: str
    origin: bool = False


@dataclass(frozen=True)
class NonFinite(BuiltIn):
    """Any NaN or inf in the loss, an activation, a gradient or a parameter.

    Names the first module in execution order that made one from finite numbers, where that was seen (see the
    `Provenance` probe); a second alert follows when it becomes known after the first. value: number of elements, where
    they were counted, else 1.
    """

    name = "non_finite"
    advice = (
        "A number overflowed or an operation is not defined there, and all that is computed from it is void. Go back "
        "to the last good checkpoint, look at logarithms, divisions, roots and half precision in the module named, "
        "and clip gradients or lower the learning rate (PyTorch, notes on numerical accuracy)."
    )

    def watcher(self) -> _NonFiniteWatcher:
        """Without anything seen, for one run."""
        return _NonFiniteWatcher(self)


class _NonFiniteWatcher:
    """Remembers what holds since when, and whether its origin is known."""

    def __init__(self, rule: NonFinite) -> None:
        self._rule = rule
        self._holding: dict[str | None, Alert] = {}
        self._explained = False
        self._last_bad = self._last_clean = 0
        self._clean = 0  # steps running
        self._sources = of_tags(_sources)

    def __call__(self, record: Record) -> Found:
        evidence = next((one for source in self._sources(tuple(record.values)) for one in source(record)), None)
        if evidence is not None:
            self._hold(record.step, evidence)
        elif record.step == self._last_bad:  # a second record of that step: of what was logged after it
            return None
        else:
            self._settle(record.step)
            return []
        return list(self._holding.values())

    def _settle(self, step: int) -> None:
        self._clean += step != self._last_clean
        self._last_clean = step
        if self._clean >= self._rule.patience:
            self._holding, self._explained = {}, False

    def _hold(self, step: int, evidence: _Evidence) -> None:
        self._last_bad, self._clean = step, 0
        if self._holding and (self._explained or not evidence.origin):
            return
        self._explained = evidence.origin
        since = f"; the last step without was {self._last_clean}" if 0 < self._last_clean < step - 1 else ""
        message = evidence.message + since
        self._holding[evidence.where] = self._rule.alert(step, evidence.where, evidence.elements, None, message)


def _sources(tags: Iterable[str]) -> list[Callable[[Record], Iterator[_Evidence]]]:
    """What of these tags may say that numbers are not finite, the most telling first."""
    sources: dict[str, Any] = {ORIGIN: _origins}
    sources |= {name: partial(_counts, name) for name in ("activation_nonfinite", *_BACKWARD)}
    sources |= {"nonfinite": _signs, "parameters_nonfinite": partial(_counts, "parameters_nonfinite")}
    sources |= {"": partial(_losses, [tag for tag in tags if tag.endswith("loss")])}
    sources |= {"val": partial(_counts, "val/activation_nonfinite")}
    there = groups_of(tags).keys() | {""}
    return [source for group, source in sources.items() if group in there]


def _origins(record: Record) -> Iterator[_Evidence]:
    for where, text in reversed(texts(record, ORIGIN)):  # what module hooks saw stands after what was inferred
        count = scalar(record, f"activation_nonfinite/{where}") or scalar(record, f"grad_nonfinite/{where}") or 1.0
        yield _Evidence(None if where == NO_MODULE else where, count, text, origin=True)


def _counts(name: str, record: Record) -> Iterator[_Evidence]:
    validation = "in validation " if name.startswith("val/") else ""
    group_name = name.removeprefix("val/")
    found = [(where, count) for where, count in group(record, name) if count]
    for where, count in reversed(found) if group_name in _BACKWARD else found:  # backward passes run backwards
        yield _Evidence(where, count, validation + _SEEN[group_name])


def _signs(record: Record) -> Iterator[_Evidence]:
    for tag, message in _SIGNS.items():
        if scalar(record, tag):
            yield _Evidence(None, 1.0, message)


def _losses(tags: Iterable[str], record: Record) -> Iterator[_Evidence]:
    for tag in tags:
        number = scalar(record, tag)
        if number is not None and not math.isfinite(number):
            yield _Evidence(None, 1.0, f"{tag} is {number}")
