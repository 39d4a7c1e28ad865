"""Attention that is written out: a product of two activations, a softmax over what one of them counts, a product again.

Calls are put on a tape. Where a softmax is met, where its logits come from is worked out backwards, and its statistics
are computed from its input, so that no logits are kept; they count when a product sums the weights over the keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from torchprobe.capture.attention import functions as fn
from torchprobe.capture.attention import uses
from torchprobe.capture.attention.functions import Product, product_of
from torchprobe.capture.attention.labelling import Labelling
from torchprobe.capture.attention.labels import is_context, roots_of
from torchprobe.capture.attention.layout import Columns, Refused, columns_of
from torchprobe.capture.attention.observer import Observer
from torchprobe.capture.attention.places import Places, of_dot_product
from torchprobe.capture.attention.sites import Caller, Reading
from torchprobe.capture.attention.softmaxes import Softmaxes, is_shifted
from torchprobe.capture.attention.tape import Args, Function, Kwargs, Node, Tape, is_plain
from torchprobe.capture.attention.uses import Flow, Outcome, Pending
from torchprobe.statistics.attention.sources import Shape

_MATTERS = "matters"
_OF_SOFTMAX = fn.SOFTMAXES | fn.LOG_SOFTMAXES | fn.EXPONENTIALS | fn.POWERS | fn.DRAWN


class Handwritten:
    """Follows the calls of a pass."""

    def __init__(self, observer: Observer, labels: Labelling, softmaxes: Softmaxes) -> None:
        self._observer = observer
        self.tape = Tape()
        self.labels = labels
        self._softmaxes = softmaxes
        self._outcome = Outcome(observer)
        self._any = False  # whether there are weights to follow

    def begin(self, modules: Iterable[nn.Module]) -> None:
        """A pass of a model of these modules begins."""
        self.forget()
        self.tape.begin(modules)

    def finish(self) -> None:
        """The pass has ended: what no later call has shown to be something else counts."""
        self._outcome.finish()

    def forget(self) -> None:
        """Hold nothing of the pass."""
        self._outcome.clear()
        self.tape.clear()
        self._any = False

    def after(self, func: Function, args: Args, kwargs: Kwargs, result: Any, within: Caller | None) -> None:
        """Look at a call; within: the call that it is a part of, where that is known."""
        nodes = self.tape.record(func, args, kwargs, result)
        if not nodes or not (self._any or self._outcome.latent or self._matters(nodes[0])):
            return
        if func in fn.WRITES:
            with self._observer.guard():
                self.tape.not_again(nodes[0])
                uses.hold_places(nodes[0], args, kwargs)
        if self._outcome.latent or self._matters(nodes[0]) or any(one.flow is not None for one in nodes[0].inputs):
            with self._observer.guard():
                self._look(nodes, args, kwargs, within)

    def _matters(self, node: Node) -> bool:
        """Whether it is a softmax, or a product, but no layer, whatever its factors hold; or it writes."""
        found: bool | None = node.kept.get(_MATTERS)
        if found is None:
            product = product_of(node)
            layer = product is None or (len(product.factors) == 2 and not uses.may_be_scores(node, product))
            found = not layer or node.func in _OF_SOFTMAX or node.func in fn.WRITES
            node.kept[_MATTERS] = found
        return found

    def _look(self, nodes: list[Node], args: Args, kwargs: Kwargs, within: Caller | None) -> None:
        node, func = nodes[0], nodes[0].func
        self._after_outputs(nodes, [one for one in node.inputs if one.flow is not None and one.flow.kind == "output"])
        if func in fn.PRODUCTS:
            self._after_product(node, args, kwargs, within)
        elif func in _OF_SOFTMAX and all(flow.kind == "exponentials" for _, flow in self._flows(node)):
            x: Any = args[0] if args else kwargs.get("input")
            if isinstance(x, Tensor):
                self.give(nodes, self._softmaxes.of_call(node, x, kwargs.get("out") is not None))
        elif flows := self._flows(node):
            self._follow(nodes, flows, args, within)

    def give(self, nodes: list[Node], flow: Flow | None) -> None:
        """They hold weights, or what becomes weights."""
        if flow is not None:
            self._any = True
            for node in nodes:
                node.take_flow(flow)

    def _flows(self, node: Node) -> list[tuple[Node, Flow]]:
        flows = [(one, one.flow) for one in node.inputs if one.flow is not None] if self._any else []
        return [pair for pair in flows if pair[1].kind != "output"]

    def say_padded(self, tokens: Tensor, padded: Tensor, place: int = 1) -> None:
        """An argument names the padded tokens of a tensor (batch, tokens, …): bool (batch, tokens).

        place: of the tokens, 0 in (tokens, batch, …) and (tokens, …).
        """
        if is_plain(tokens):
            batch = 1 - place if len(padded) > 1 else None
            self._observer.padding.say(self.labels.of(self.tape.node(tokens)), batch, place, padded)

    def places(self, query: Tensor, key: Tensor, shape: Shape) -> Places:
        """Where the queries of a dot product stand among its keys."""
        if not (is_plain(query) and is_plain(key)):
            return Places(shape.queries != shape.keys, None)
        asked, keys = self.tape.node(query), self.tape.node(key)
        later = asked if asked.order > keys.order else keys  # which does not outlive what it is kept with
        where = asked, keys, shape.queries, shape.keys
        if where not in later.kept:
            of_query, of_key = self.labels.of(asked), self.labels.of(keys)
            later.kept[where] = of_dot_product(of_query, of_key, shape.queries, shape.keys)
        found: Places = later.kept[where]
        return found

    # ---- products

    def _after_product(self, node: Node, args: Args, kwargs: Kwargs, within: Caller | None) -> None:
        product = product_of(node)
        if product is None:
            return
        flows = self._flows(node)
        for which, factor in enumerate(product.factors):
            if len(flows) == 1 and factor is flows[0][0]:
                self._after_use(node, product, which, flows[0][1], (args, kwargs), within)
        if len(flows) > 1:
            self._outcome.stray([pending for _, flow in flows for pending in flow.pending], "whose weights meet others")
        if not flows and len(product.factors) == 2 and uses.may_be_scores(node, product):
            caller = within or self._observer.owners.caller()
            if node.label is not None and node.caller != caller:
                self.tape.unlearn_from(node)
            node.called_by(caller)
            if self._outcome.latent:
                for which, factor in enumerate(product.factors):  # what is summed with activations was no query
                    dims = self.labels.of(factor).dims
                    self._outcome.rule_out(set(roots_of(dims[axis] for axis in product.summed(which))))

    def _after_use(
        self, node: Node, product: Product, which: int, flow: Flow, call: Any, within: Caller | None
    ) -> None:
        """Weights have been multiplied with something: with values, or among heads."""
        factor = product.factors[which]
        axis = self._key_axis(factor, flow)
        if not flow.first.keys:
            axis = next((i for i in product.summed(which) if factor.shape[i] == 1), axis)
        if axis is None:
            if flow.kind == "weights" and not all(one.const for one in product.factors if one is not factor):
                self._outcome.stray(flow.pending, "whose weights are rearranged")
            return
        if product.names[which][axis] in product.result:
            self.give([node], uses.mixed(product, which, flow))
        elif flow.kind == "weights":
            scores = flow.first.of[0].label if flow.first.of is not None else None
            if scores and any(is_context(scores, self.labels.of(one)) for one in product.factors if one is not factor):
                flow = flow.as_changed("between features, as in linear attention")
            self._use(factor, axis, flow, uses.tensor_of(self.tape, factor, *call), within)
            self.give([node], Flow("output", flow.pending))
        elif flow.kind == "exponentials" and not flow.changed:
            if is_shifted(flow.first, self.labels.of):
                self._outcome.stray(flow.pending, "whose exponentials are not divided by their sum")
            self.give([node], replace(flow, multiplied=True))

    def _after_outputs(self, nodes: list[Node], outputs: list[Node]) -> None:
        """Attended values meet something: the scores tell where several softmaxes are merged into one."""
        if not outputs:
            return
        node, func = nodes[0], nodes[0].func
        pending = tuple(dict.fromkeys(one for node in outputs for one in node.flow.pending))
        others = [one for one in node.inputs if one not in outputs and not one.const]
        for one in pending:
            if any(uses.meets_scores(other, one, self.labels.of) for other in others):
                self._outcome.refuse(one, one.because("whose outputs are weighted by its scores"))
        if not others and (func in fn.JOINS or uses.keeps(node, outputs[0]) or (func and fn.is_pointwise(func))):
            self.give(nodes, Flow("output", pending))

    def _key_axis(self, node: Node, flow: Flow) -> int | None:
        return uses.key_axis(self.labels.of(node), flow)

    # ---- the use of weights

    def _use(self, node: Node, axis: int | None, flow: Flow, weights: Tensor | None, within: Caller | None) -> None:
        """Weights are summed with values over the keys, the dimension `axis`; None: before they were divided."""
        new = [pending for pending in flow.pending if pending.is_new(node, self.labels.of(node), axis)]
        for pending in new:
            self._outcome.take(pending, within)
        if not new:
            return
        if reason := next((pending.reason for pending in flow.pending if pending.reason), None):
            self._outcome.refuse(flow.first, reason)
        elif axis is None or (not flow.changed and self._as_read(node, axis, flow.first)):
            self._outcome.stray([one for one in new if not one.whole], "of whose weights a part is used alone")
            for pending in (one for one in new if one.whole):
                self._outcome.count(pending, pending.reading)
        elif isinstance(found := flow.used or self._read_as_used(node, axis, flow, weights), str):
            self._outcome.refuse(flow.first, flow.first.because(found))
        else:
            self._outcome.count(flow.first, found)

    def _as_read(self, node: Node, axis: int, pending: Pending) -> bool:
        """Whether the keys that are summed over are those that were read."""
        if pending.arranged is None:
            return False
        key = "columns", axis, pending.arranged.side
        if key not in node.kept:
            node.kept[key] = columns_of(self.labels.of(node), *key[1:])
        columns: Columns | Refused = node.kept[key]
        return not isinstance(columns, Refused) and bool(np.array_equal(columns[2], pending.arranged.of_keys))

    def _read_as_used(self, node: Node, axis: int, flow: Flow, weights: Tensor | None) -> Reading | str:
        if weights is None or flow.dropped:
            return "whose weights are changed after a dropout"
        return self._softmaxes.read_weights(weights, node, axis, flow)

    # ---- what happens to weights on the way

    def _follow(self, nodes: list[Node], flows: list[tuple[Node, Flow]], args: Args, within: Caller | None) -> None:
        node, func, (source, flow) = nodes[0], nodes[0].func, flows[0]
        if func in fn.DIVISIONS | fn.MULTIPLICATIONS and len(flows) == 2 and self._after_division(node, flows, within):
            return
        if func in fn.DIFFERENCES and flow.kind == "total":
            pass  # logits less the logarithm of a sum, no weights
        elif func in fn.EXPONENTIALS and flow.kind == "logarithms":
            self.give(nodes, replace(flow, kind="weights"))
        elif func in _OF_SOFTMAX:
            self.give(nodes, flow.as_changed("whose weights pass a second softmax"))
        elif func in fn.SUMS or func in fn.REDUCTIONS:
            self._after_sum(node, source, flow, args, within)
        elif func in fn.NORMALISED and flow.kind == "exponentials":
            self.give(nodes, replace(flow, kind="weights", changed=True))
        elif func in fn.DROPOUTS or uses.drops(node, flow):
            self.give(nodes, self._after_dropout(node, source, flow, args))
        elif uses.keeps(node, source) or func in fn.WITHOUT_NAN:
            self.give(nodes, flow)
        elif func in fn.JOINS:
            pending = tuple(dict.fromkeys(one for _, other in flows for one in other.pending))
            self.give(nodes, replace(flow, pending=pending, changed=any(other.changed for _, other in flows)))
        elif fn.is_pointwise(func) and func is not None:
            others = [one for one in node.inputs if one.flow is None and not one.const]
            strange = any(uses.meets_scores(one, flow.first, self.labels.of, others=True) for one in others)
            flow = flow.as_changed("whose weights are weighted by other scores") if strange else flow
            self.give(nodes, uses.pointwise(node, source, flow))
        elif func in fn.PICKS or self._key_axis(node, flow) is not None:
            learned = any(one.learned for one in node.inputs if one.flow is None)
            self.give(nodes, flow.as_changed(uses.MIXED if learned else None))
        elif node.shape == source.shape and func not in fn.RANDOM | fn.LIKE:
            self.give(nodes, flow.as_changed(None))

    def _after_dropout(self, node: Node, source: Node, flow: Flow, args: Args) -> Flow:
        if not flow.changed or flow.dropped or flow.used is not None or flow.kind != "weights":
            return replace(flow, dropped=True)
        axis = self._key_axis(source, flow)
        weights: Any = args[0] if node.func in fn.DROPOUTS and args else uses.tensor_of(self.tape, source, args, {})
        if axis is None or not isinstance(weights, Tensor) or flow.first.reason is not None:
            return replace(flow, dropped=True)
        used = self._read_as_used(source, axis, flow, weights)
        return replace(flow, refused=used) if isinstance(used, str) else replace(flow, used=used)

    def _after_sum(self, node: Node, source: Node, flow: Flow, args: Args, within: Caller | None) -> None:
        axis = self._key_axis(source, flow)
        if axis is None:
            return
        if self._key_axis(node, flow) is not None and (flow.first.keys or flow.kind != "exponentials"):
            self.give([node], flow.as_changed(None))
        elif flow.multiplied and flow.kind == "weights":
            before = next((one for one in uses.back(source) if one.flow is not None and not one.flow.multiplied), None)
            inner = None if before is None else self._key_axis(before, flow)
            if before is not None and inner is not None:
                self._use(before, inner, replace(flow, multiplied=False), None, within)
                self.give([node], Flow("output", flow.pending))
        elif node.func in fn.SUMS and not flow.multiplied:
            self.give([node], replace(flow, kind="total"))

    def _after_division(self, node: Node, flows: list[tuple[Node, Flow]], within: Caller | None) -> bool:
        """A softmax that is written out: exponentials, divided by their sum before or after they multiply values."""
        (source, flow), (_, total) = flows
        if total.kind != "total" or total.first is not flow.first or flow.kind == "total":
            return False
        total = replace(total, changed=total.changed or node.func in fn.MULTIPLICATIONS)  # with one over it
        if flow.multiplied:
            if total.changed or flow.changed:
                self._outcome.refuse(flow.first, flow.first.because("whose sum of exponentials is changed"))
            else:
                self._use(source, None, replace(flow, multiplied=False), None, within)
                self.give([node], Flow("output", flow.pending))
        else:
            changed = total.changed or flow.changed or flow.kind == "weights"
            self.give([node], replace(flow, kind="weights", changed=changed))
        return True
