"""Attention that is written out inside a compiled graph: the same tracker, over the graph that Dynamo builds.

While a module is traced, an operator is put beside each softmax, with a number; what the graph holds after each call
says of which numbers the inputs are logits of an attention, and how to read them.
"""

from __future__ import annotations

import itertools
import logging
from typing import Any

from torchprobe.capture.attention.followed import CHANGED, Followed, Plan
from torchprobe.capture.compiled.tracing import constant, graph_of_trace

_SYMBOLS = "whose sizes are symbols, in a compiled graph"
_UNSEEN = "if it is one, whose compiled graph could not be looked into"

_log = logging.getLogger("torchprobe")
_numbers = itertools.count()

_plans: dict[int, Plan] = {}
"""By number, as graphs hold them: these outlive sessions, and serve all modules of a class."""


def plan_of(number: int) -> Plan | None:
    """How the input of a softmax is read; None where it is no attention's. Its graph runs: nothing is held of it."""
    _looking.forget()
    return _plans.get(number)


@constant
def new_number() -> int:
    """Of the softmax that is traced."""
    number = next(_numbers)
    if _looking.given_up:
        _plans[number] = Plan(None, _UNSEEN)
    elif graph_of_trace() is None:
        _plans[number] = Plan(None, "whose softmax is inside an activation checkpoint of a compiled graph")
    return number


@constant
def look() -> bool:
    """A call has been traced: find the attentions in what the graph holds so far."""
    try:
        graph = graph_of_trace()
        if graph is not None:
            _looking.at(graph)
    except Exception:  # of which the user's compilation hears nothing
        _log.exception("attention inside compiled graphs is not looked for any more; the model runs as ever")
        _looking.give_up()
    return True


class _Looking:
    """The graph that is being built, and what of it was looked at."""

    def __init__(self) -> None:
        self._of: tuple[Any, _Tracker] | None = None
        self.given_up = False

    def give_up(self) -> None:
        """Something went wrong: nothing is looked at any more, and softmaxes are said."""
        self.given_up = True
        for number in self._of[1].numbers.values() if self._of else ():
            _plans[number] = Plan(None, _UNSEEN)

    def forget(self) -> None:
        """Graphs are done."""
        self._of = None

    def at(self, graph: Any) -> None:
        """Look at what is new in a graph."""
        if self.given_up:
            return
        if self._of is None or self._of[0] is not graph:
            self._of = graph, _Tracker()
        self._of[1].follow(graph)
        self._of[1].conclude()


class _Tracker(Followed):
    """Tells operators how to read, by number."""

    def conclude(self) -> None:
        """What was found so far."""
        used = {id(x): Plan(None, pending.reason or CHANGED) for x, pending, _ in self.softmaxes.met if pending.taken}
        used |= {logits: plan for logits, (plan, _) in self.found.plans.items()}
        for logits, number in self.numbers.items():
            plan = Plan(None, _SYMBOLS) if self.has_symbols else used.get(logits)
            if plan is not None:
                _plans[number] = plan


_looking = _Looking()
