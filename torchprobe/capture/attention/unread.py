"""Attention inside compiled graphs that nothing reads: said with the name of its module.

Each graph that is made while a step is sampled is looked at once, as Dynamo hands it on: read, and left as it is.
"""

from __future__ import annotations

from types import CodeType
from typing import Any, NamedTuple
from weakref import ReferenceType

import torch
from torch import Tensor, nn

from torchprobe.capture.attention import dot_product, multi_head, stack
from torchprobe.capture.attention import functions as fn
from torchprobe.capture.attention.graph import CHANGED, Followed, Planning, flat
from torchprobe.capture.attention.labelling import Labelling
from torchprobe.capture.attention.labels import Shape, leaves
from torchprobe.capture.attention.observer import Call, Observer
from torchprobe.capture.attention.tape import Node
from torchprobe.capture.attention.uses import Flow, Kind, Pending
from torchprobe.capture.compiled import operators, tracing
from torchprobe.capture.compiled.graphs import Hearing, account_of_trace
from torchprobe.capture.source import Running
from torchprobe.messages import log as _log
from torchprobe.naming import named_modules

_WRITTEN = "written out inside a compiled graph"
_BROKEN = "if it is one, which a graph break cuts in two"
_CALLS = (*dot_product.FUNCTIONS, multi_head.FUNCTION)


class GraphLook(Hearing):
    """Says what attention of a model is in its graphs and not read.

    said: there is some. free: graphs were looked at, and none has a call that attention is made of.
    """

    def __init__(self, model: ReferenceType[nn.Module], observer: Observer, running: Running) -> None:
        self._model = model
        self._observer = observer
        self._running = running
        self._cut, self._failed = _Cut(set(), set()), False
        self.said = self.free = self._may_be = False
        super().__init__()

    def compiled(self, code: CodeType) -> None:
        """Dynamo has traced a frame of this code."""
        if self._failed or self._observer.gate.failed or not (self._running.training and self._running.sampled):
            return
        try:
            with stack.unseen(), torch.inference_mode(False), torch.no_grad():
                self._look()
        except Exception:  # the compiler must not hear of it
            self._failed, self.free = True, False
            _log.exception("attention inside compiled graphs is not looked for any more; the model runs as ever")
            self._observer.uncovered["compiled graphs that could not be looked into"] += 1

    def _look(self) -> None:
        model, account = self._model(), account_of_trace()
        if model is None or account is None:
            return
        caller = self._observer.owners.caller(beyond_graphs=True)
        names = _Names(model, None if caller is None else caller.name)
        graph = _Graph(account, names, self._cut, self._observer.stands)
        if names.are_in(account.graph):
            graph.follow(account.graph)
            self._say(graph.unread())
            self._may_be |= graph.may_attend
            self.free = not self._may_be
            graph.leave(self._cut, tracing.ends_at_a_break(account))

    def _say(self, reasons: dict[str, None]) -> None:
        for reason in reasons:
            self._observer.uncovered[reason] += 1
            if not self.said:
                _log.warning("not recorded: %s; session.summary() names them all, and the model runs as ever", reason)
            self.said = True


class _Names:
    """The modules of the watched model, as graphs speak of them."""

    def __init__(self, model: nn.Module, around: str | None) -> None:
        """around: whose code the graph is of, or calls what it is of."""
        modules = dict(named_modules(model))
        self._of = {str(id(module)): name for name, module in modules.items()}
        self._around = around
        kind = type(modules[around]) if around in modules else None
        self._peers = [name for name, module in modules.items() if type(module) is kind and name != around]

    def are_in(self, graph: Any) -> bool:
        """Whether a graph has something to do with the model."""
        return self._around is not None or any(
            key in self._of for n in graph.nodes for key, _ in tracing.modules_around(n)
        )

    def owner(self, node: Any) -> str | None:
        """The innermost module of the user's own whose code makes a call."""
        own = [
            self._of[key]
            for key, kind in tracing.modules_around(node)
            if key in self._of and not tracing.is_torchs(kind)
        ]
        return own[-1] if own else self._around

    def more(self, name: str) -> str:
        """Which others may run the same graph, which is kept by code."""
        if not self._peers or self._around is None or not f"{name}.".startswith(f"{self._around}."):
            return ""
        return f" (a graph that {self._peers[0]}{name.removeprefix(self._around)} and its like may share)"


class _Cut(NamedTuple):
    """What left graphs at their breaks, by shape."""

    scores: set[Shape]
    weights: set[Shape]


class _Graph(Followed):
    """A graph that is complete."""

    def __init__(self, account: Any, names: _Names, cut: _Cut, stands: dot_product.Stands) -> None:
        self._cut = cut
        super().__init__()
        self._account, self._names, self._stands = account, names, stands
        self._buffers = tracing.buffers_of(account)
        self._stand_ins: dict[int, tuple[Any, Tensor]] = {}
        self._memory: dict[Any, Tensor] = {}
        self._outer: list[str | None] = []
        self._queries: set[Any] = set()
        self._read_in: set[str | None] = set()
        self._calls: list[tuple[Any, str | None]] = []
        self._checkpointed: set[int] = set()
        self._flex_is_heard = self.may_attend = False

    def planning(self, observer: Observer, labels: Labelling) -> Planning:
        """Also softmaxes of what may be scores that another graph made."""
        return _Resumed(observer, labels, self._cut.scores)

    # ---- calls

    def take(self, node: Any) -> None:
        """The next of the graph."""
        self.may_attend |= tracing.may_attend(node)
        if node.target is operators.attention:
            query = node.args[1]
            self._queries |= {query, query.args[0] if query.args else query}
            self._read_in.add(self.owner(node))
            dot_product.note_places(self, node, self._stands)
        elif node.target is operators.unread:
            self._flex_is_heard = True
        elif node.target in _CALLS or _is_kernel(node.target):
            self._calls.append((node, self.owner(node)))
        before = len(self.softmaxes.met)
        super().take(node)
        if self._outer:
            self._checkpointed |= {id(x) for x, *_ in self.softmaxes.met[before:]}
        if node.op == "placeholder" and isinstance(value := self.values[node], Tensor):
            self._resume(node, value)

    def _resume(self, node: Any, value: Tensor) -> None:
        """What may be weights of another graph."""
        if tuple(value.shape) in self._cut.weights:
            made = self.handwritten.tape.node(value)
            keys = frozenset(leaves([self.handwritten.labels.of(made).dims[-1]]))
            self.found.caller_is(self.owner(node))
            caller = self.found.caller()
            if caller is not None and not made.const:
                pending = Pending(Call(caller, False), None, None, _BROKEN, keys)
                self.softmaxes.met.append((value, pending, made))
                self.handwritten.give([made], Flow("weights", (pending,)))

    def call(self, node: Any, value: Any) -> Any:
        """A call, or all those in the part of a graph that an activation checkpoint is of."""
        body = tracing.body_of(node)
        if body is None:
            return super().call(node, value)
        inputs = [one for one in body.nodes if one.op == "placeholder"]
        given = [self._argument(one) for one in node.args[-len(inputs) :]] if inputs else []
        self.values |= dict(zip(inputs, given, strict=True))
        self._outer.append(self.owner(node))
        for inner in body.nodes:
            if inner.op == "output":
                value = self._argument(inner.args[0])
            elif inner.op != "placeholder":
                self.take(inner)
        self._outer.pop()
        return value

    def owner(self, node: Any) -> str | None:
        """Whose call it is."""
        return self._names.owner(node)

    def is_constant(self, node: Any) -> bool:
        """Whether an input is a parameter or a buffer."""
        return tracing.is_constant(node) or tracing.plainly_named(str(node.target)) in self._buffers

    # ---- stand-ins: a look at what has symbols for sizes would guard them

    def value_of(self, node: Any) -> Any:
        """What a call gives, in numbers."""
        return self._in_numbers(node.meta.get("example_value"))

    def _in_numbers(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._stand_in(value)
        if isinstance(value, tuple | list):
            return tuple(map(self._in_numbers, value))
        return tracing.hint_of(value)

    def _stand_in(self, value: Tensor) -> Tensor | None:
        if id(value) not in self._stand_ins and value.layout is torch.strided and not value.is_nested:
            sizes = [
                [tracing.hint_of(one) for one in each]
                for each in (value.shape, value.stride(), [value.storage_offset()])
            ]
            if any(one is None for each in sizes for one in each):
                return None
            key = value.untyped_storage()._cdata, value.dtype
            if key not in self._memory:
                self._memory[key] = torch.empty(2**48, dtype=value.dtype, device="meta")
            self._stand_ins[id(value)] = value, self._memory[key].as_strided(sizes[0], sizes[1], *sizes[2])
        return self._stand_ins.get(id(value), (None, None))[1]

    # ---- what is said

    def unread(self) -> dict[str, None]:
        """Reasons, each with the name of a module, in order."""
        self.handwritten.finish()
        found: dict[str, None] = {}
        for x, pending, node in self.softmaxes.met:
            if self._is_left(x, pending):
                whose = self.found.plans[id(x)][1] if id(x) in self.found.plans else pending.call.caller.name
                found[f"the attention of {whose}, {self._why(x, pending, node)}{self._names.more(whose)}"] = None
        for call, name in self._calls:
            read = name in self._read_in if call.target is multi_head.FUNCTION else call.args[0] in self._queries
            if name is not None and not read and not (call.target is stack.FLEX and self._flex_is_heard):
                what = "a call in code that is not looked into" if call.target in _CALLS else "a kernel"
                found[f"the attention of {name}, {what}, inside a compiled graph{self._names.more(name)}"] = None
        return found

    def _is_left(self, x: Tensor, pending: Pending) -> bool:
        latent = pending.arranged is not None and bool(pending.arranged.latent)
        by_an_operator = id(x) in self.numbers and pending.reason != _BROKEN
        return pending.taken and not by_an_operator and (not latent or id(x) in self.found.plans)

    def _why(self, x: Tensor, pending: Pending, node: Node) -> str:
        plan = self.found.plans.get(id(x))
        refused = CHANGED if plan is None else plan[0].refused
        if pending.reason is not None:
            refused = pending.reason.removeprefix(f"the attention of {pending.call.caller.name}, ")
        elif node.func in fn.EXPONENTIALS:
            refused = "whose softmax is written with exp"
        elif id(x) in self._checkpointed:
            refused = "inside an activation checkpoint"
        if refused is None:
            return f'{_WRITTEN}: Attention(compiled="read") reads it'
        return f"{refused.removeprefix('in a compiled graph, ').removesuffix(', in a compiled graph')}, {_WRITTEN}"

    def leave(self, cut: _Cut, breaks: bool) -> None:
        """What another graph may go on with. breaks: because this one ends at a graph break."""
        outputs = [one for node in self._account.graph.nodes if node.op == "output" for one in flat(node.args)]
        for value in (self.values.get(one) for one in outputs if isinstance(one, torch.fx.Node)):
            made = self.handwritten.tape.known(value) if isinstance(value, Tensor) else None
            if made is not None and made.flow is not None:
                if not made.flow.first.taken and (breaks or made.flow.first.reason == _BROKEN):
                    cut.weights.add(made.shape)
            elif made is not None and breaks and self.handwritten.labels.of(made).sides == {0, 1}:
                cut.scores.add(made.shape)


class _Resumed(Planning):
    """Looks at softmaxes of inputs, too, that have the shape of scores that another graph made."""

    def __init__(self, observer: Observer, labels: Labelling, scores: set[Shape]) -> None:
        super().__init__(observer, labels)
        self._scores = scores

    def _pending(self, source: Node, x: Tensor | None, axis: int, kind: Kind, reason: str | None = None) -> Flow | None:
        flow, caller = super()._pending(source, x, axis, kind, reason), self._observer.owners.caller()
        if flow is not None or caller is None or source.shape not in self._scores or not _is_input(source):
            return flow
        keys = frozenset(leaves([self._labels.of(source).dims[axis]]))
        return Flow(kind, (Pending(Call(caller, False), None, None, _BROKEN, keys),))


def _is_input(node: Node | None) -> bool:
    """Whether something is an input of the graph, changed element by element."""
    while node is not None and node.func is not None:
        same = fn.is_pointwise(node.func) or node.func in fn.SAME
        node = next((one for one in node.inputs if one.shape == node.shape and not one.const), None) if same else None
    return node is not None and not node.const


def _is_kernel(target: Any) -> bool:
    return target is stack.FLEX or (stack.is_operator(target) and dot_product.call_of(target, (), {}) is not None)
