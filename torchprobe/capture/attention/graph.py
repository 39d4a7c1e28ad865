"""Attention that is written out inside a compiled graph: the same tracker, over the graph that Dynamo builds.

While a module is traced, an operator is put beside each softmax, with a number; what the graph holds after each call
says of which numbers the inputs are logits of an attention, and how to read them.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from torchprobe.capture.attention import functions as fn
from torchprobe.capture.attention.handwritten import Handwritten
from torchprobe.capture.attention.labelling import Labelling
from torchprobe.capture.attention.layout import Arrangement
from torchprobe.capture.attention.observer import Call, Observer
from torchprobe.capture.attention.padding import Padding
from torchprobe.capture.attention.sites import Caller, Reading, Sites
from torchprobe.capture.attention.softmaxes import Softmaxes, is_added_to, unreadable
from torchprobe.capture.attention.tape import Node
from torchprobe.capture.attention.uses import Flow, Pending
from torchprobe.capture.compiled import operators
from torchprobe.capture.compiled.tracing import constant, function_of, graph_of_trace, is_constant, module_of
from torchprobe.messages import log as _log

CHANGED = "whose weights are changed, in a compiled graph"
_ELSEWHERE = "whose softmax is in another module than its products, in a compiled graph"
_SYMBOLS = "whose sizes are symbols, in a compiled graph"
_UNSEEN = "if it is one, whose compiled graph could not be looked into"

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Plan:
    """How to read the input of a softmax; refused: why not, where it is an attention. masked: as in `Logits`."""

    arranged: Arrangement | None
    refused: str | None = None
    masked: bool = False


class Followed:
    """Goes over the calls of a graph, whose tensors have shapes and no values."""

    def __init__(self) -> None:
        self.values: dict[Any, Any] = {}
        self.numbers: dict[int, int] = {}
        """Of the softmaxes that an operator stands beside, by the identity of their input."""
        self.found = Found()
        observer, labels = cast("Observer", self.found), Labelling()
        self.softmaxes = self.planning(observer, labels)
        self.handwritten = Handwritten(observer, labels, self.softmaxes)
        self.handwritten.begin(())
        self.has_symbols = False

    def planning(self, observer: Observer, labels: Labelling) -> Planning:
        """What looks at softmaxes."""
        return Planning(observer, labels)

    def follow(self, graph: Any) -> None:
        """What is new; inputs come into a graph before all others, when a call needs them."""
        calls = itertools.takewhile(lambda node: node not in self.values, reversed(graph.nodes))
        for node in list(calls)[::-1]:
            self.take(node)

    def take(self, node: Any) -> None:
        """The next of the graph."""
        if node.target is operators.logits:
            given = node.args[1]
            source = given.args[0] if given.target == "detach" else given
            self.numbers[id(self.values.get(source, given.meta.get("example_value")))] = node.args[2]
        value = self.value_of(node)
        if node.op in ("placeholder", "get_attr") and isinstance(value, Tensor) and self.is_constant(node):
            learned = isinstance(node.meta.get("example_value"), torch.nn.Parameter)
            self.handwritten.tape.node(value).as_constant(learned)
        elif node.op in ("call_function", "call_method"):
            value = self.call(node, value)
        self.values[node] = value

    def value_of(self, node: Any) -> Any:
        """What a call gives."""
        return node.meta.get("example_value")

    def is_constant(self, node: Any) -> bool:
        """Whether an input is a parameter or a buffer."""
        return is_constant(node)

    def call(self, node: Any, value: Any) -> Any:
        """A call; its value, which is another tensor for what changes one in place."""
        args = [self._argument(one) for one in node.args]
        kwargs = {name: self._argument(one) for name, one in node.kwargs.items()}
        if node.target is operator.getitem and not isinstance(args[0], Tensor):
            return args[0][args[1]]  # one of several results
        func, args = function_of(node.target, args)
        tensors = [one for one in flat([value, *args]) if isinstance(one, Tensor)]
        self.has_symbols = self.has_symbols or any(not _is_known(one) for one in tensors)
        if func is None or not tensors or self.has_symbols or getattr(func, "namespace", "") == operators.NAMESPACE:
            return value
        if fn.is_in_place(func) and isinstance(args[0], Tensor):
            value = args[0]
        self.found.caller_is(self.owner(node))
        result = None if getattr(func, "__name__", "") == "__setitem__" else value
        self.handwritten.after(func, tuple(args), kwargs, result, None)
        self._check(node, value)
        return value

    def owner(self, node: Any) -> str | None:
        """Whose call it is; None: nobody's of the watched model."""
        return module_of(node)

    def _check(self, node: Any, value: Any) -> None:
        """What was made of inputs that the tracker does not see is no constant."""
        known = self.handwritten.tape.known
        inputs = {known(one) for one in flat([self.values[one] for one in node.all_input_nodes])} - {None}
        for made in filter(None, map(known, flat([value]))):
            if not inputs <= set(made.inputs):
                made.is_made_of_others()

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, torch.fx.Node):
            if argument not in self.values:
                self.take(argument)
            return self.values[argument]
        if isinstance(argument, slice):
            return slice(*map(self._argument, (argument.start, argument.stop, argument.step)))
        if isinstance(argument, tuple | list):
            values = [self._argument(one) for one in argument]
            return values if isinstance(argument, list) else tuple(values)
        return argument


def _is_known(tensor: Tensor) -> bool:
    """Whether its sizes are numbers."""
    return all(type(size) is int for size in (*tensor.shape, *tensor.stride(), tensor.storage_offset()))


def flat(values: Any) -> Iterator[Any]:
    """What is in lists in lists."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from flat(value)
        else:
            yield value


# ---- what the tracker is told, and tells


class Found:
    """Stands where outside of graphs statistics are computed: keeps how they are to be."""

    def __init__(self) -> None:
        self.owners = self.uncovered = self
        self.sites = Sites()
        self.padding = Padding()
        self._caller: Caller | None = None
        self.plans: dict[int, tuple[Plan, str]] = {}
        """Of attentions, by the identity of their logits; and whose."""

    def caller_is(self, name: str | None) -> None:
        """A call is looked at."""
        self._caller = None if name is None else Caller(name, (), None)

    def caller(self) -> Caller | None:
        """Whose it is."""
        return self._caller

    def guard(self) -> AbstractContextManager[None]:
        """Nothing of it is in a user's way."""
        return nullcontext()

    def add(self, reason: str) -> None:
        """An attention cannot be read: which, is told by its softmax."""

    def record(self, call: Call, reading: Reading, name: str) -> None:
        """Weights are used with values."""
        planned = cast("_Planned", reading)
        refused = planned.plan.refused or (None if name == planned.owner else _ELSEWHERE)
        self.plans[id(planned.logits)] = replace(planned.plan, refused=refused), name


@dataclass(frozen=True, slots=True)
class _Planned:
    plan: Plan
    logits: Tensor
    owner: str


class Planning(Softmaxes):
    """Says how logits are to be read."""

    def __init__(self, observer: Observer, labels: Labelling) -> None:
        super().__init__(observer, labels)
        self.met: list[tuple[Tensor, Pending, Node]] = []
        """Softmaxes of attentions, as far as is known before they are used: input, and call."""

    def _read(self, logits: Tensor, source: Node, arranged: Arrangement, call: Call) -> Reading:
        caller = self._observer.owners.caller()
        plan = Plan(arranged, unreadable(source, arranged), is_added_to(source))
        return cast("Reading", _Planned(plan, logits, caller.name if caller else ""))

    def _unusual(self, x: Tensor | None) -> str | None:
        return None

    def of_call(self, node: Node, x: Tensor, out: bool) -> Flow | None:
        """What it found is remembered: it may be used in a way that cannot be read."""
        if flow := super().of_call(node, x, out):
            self.met.append((x, flow.first, node))
        return flow

    def read_weights(self, weights: Tensor, source: Node, axis: int, flow: Flow) -> Reading | str:
        """They are not there."""
        return CHANGED


# ---- by number


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
        if graph is not None and not _looking.given_up:
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
