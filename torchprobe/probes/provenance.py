"""Provenance of NaN and inf: which module made them from finite numbers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.naming import ROOT
from torchprobe.probes.base import Probe
from torchprobe.records import Text, Value

NO_MODULE = "(loss)"  # in place of a module's name: it happened outside the model


class Event(NamedTuple):
    """A tensor that a module saw: when, which one, in which call of the module, as what, and its extremes."""

    turn: int
    tensor: int
    call: int
    kind: str
    name: str
    low: float
    high: float

    @classmethod
    def of(cls, row: str, low: float, high: float) -> Event:
        """A row's name is `turn tensor call kind name`."""
        turn, tensor, call, kind, name = row.split(" ", 4)
        return cls(int(turn), int(tensor), int(call), kind, name, low, high)

    @property
    def finite(self) -> bool:
        """Whether all elements are."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def sound(self) -> bool:
        """Neither NaN nor inf; -inf is what masks are made of."""
        return not math.isnan(self.low) and self.high < math.inf

    @property
    def made(self) -> str:
        """What it holds that is not finite."""
        return "NaN" if math.isnan(self.low) else "inf" if self.high == math.inf else "-inf"


class Provenance(Probe):
    """`provenance/<module>`: a sentence on the first module in execution order that made NaN or inf, when one did.

    Looks at extremes of inputs, outputs, parameters and gradients of every module, from the model down to its leaves,
    in eager training passes: on sampled steps, and on the steps after NaN or inf was seen (which the `non_finite` rule
    asks for even without this probe). Costs two reductions a tensor.
    """

    source: ClassVar[str] = "flow"
    found_everywhere: ClassVar[bool] = False
    fields: ClassVar[tuple[str, ...]] = ("low", "high")
    combines_many: ClassVar[bool] = True
    descriptions: Mapping[str, str] = {
        "provenance": "The first module in execution order that made NaN or inf from finite numbers."
    }

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        """The extremes of two tensors together; NaN stays NaN."""
        return torch.stack((torch.minimum(a[..., 0], b[..., 0]), torch.maximum(a[..., 1], b[..., 1])), dim=-1)

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """A name is an `Event`'s; at most one value a step."""
        if (~np.isnan(rows[:, 0]) & (rows[:, 1] < math.inf)).all():  # `Event.sound`, of all at once
            return
        events = sorted(Event.of(name, *extremes) for name, extremes in zip(names, rows.tolist(), strict=True))
        found = _in_forward(events) or _in_backward(events)
        if found is not None:
            yield f"provenance/{found[0]}", Text(found[1])


def _in_forward(events: Sequence[Event]) -> tuple[str, str] | None:
    inputs = defaultdict[int, list[Event]](list)
    for event in events:
        if event.kind == "in":
            inputs[event.call].append(event)
    for event in events:
        if event.kind == "parameter" and not event.finite:
            text = f"{event.name} held {event.made} before the forward pass, as the optimizer's last update left it"
            return event.name, text
        if event.kind == "in" and event.name == ROOT and not event.sound:
            return NO_MODULE, f"the model's input holds {event.made}"
        maker = _maker(event, events, inputs) if event.kind == "out" and not event.sound else None
        if maker is not None and all(given.finite for given in inputs[maker.call]):
            became = "" if maker is event else f", which became {event.made} in {event.name}"
            given = _range(inputs[maker.call])
            return maker.name, f"{maker.name} produced {maker.made} from {given} in the forward pass{became}"
    bad = next((e for e in events if e.kind == "out" and not e.sound), None)
    if bad is None:
        return None
    first = next(e for e in events if e.kind == "out" and not e.finite)  # -inf, from which NaN came later
    return first.name, f"{first.name} produced {first.made}, which became {bad.made} in {bad.name}"


def _maker(event: Event, events: Sequence[Event], inputs: Mapping[int, Sequence[Event]]) -> Event:
    """The first output, of this module or of those that gave it what it was called with, that is not finite."""
    while True:
        given = {one.tensor for one in inputs.get(event.call, ()) if not one.finite}
        outs = (e for e in events if e.kind == "out" and e.turn < event.turn and not e.finite)
        earlier = next((e for e in outs if e.tensor in given), None)
        if earlier is None:
            return event
        event = earlier


def _in_backward(events: Sequence[Event]) -> tuple[str, str] | None:
    gradients = [event for event in events if event.kind.startswith("grad")]
    first = next((event for event in gradients if not event.finite), None)
    if first is None:
        return None
    given = {event.call: event for event in gradients if event.kind == "grad_out" and event.turn < first.turn}
    same = [event for event in gradients if event.tensor == first.tensor and not event.finite]
    makers = [
        event.call for event in same if event.kind == "grad_in" and event.call in given and given[event.call].finite
    ]
    if makers:  # the innermost module, called last, that got a finite gradient and gave this one
        maker = given[max(makers)]
        return maker.name, f"{maker.name} produced {first.made} from {_range([maker])} in the backward pass"
    if given:
        return first.name, f"the gradient of the output of {first.name} is the first that holds {first.made}"
    return NO_MODULE, f"the gradient that the loss gives the model holds {first.made} already"


def _range(events: Iterable[Event]) -> str:
    largest = max((max(abs(e.low), abs(e.high)) for e in events), default=None)
    return "finite inputs" if largest is None else f"finite inputs (max |x| = {largest:.3g})"
