"""Works labels out backwards from where they are asked for: a table of what products, joins and others do to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torchprobe.capture.attention import functions as fn
from torchprobe.capture.attention import joins
from torchprobe.capture.attention.dot_product import FUNCTIONS
from torchprobe.capture.attention.functions import Product, product_of
from torchprobe.capture.attention.labels import (
    Between,
    Dim,
    Label,
    Root,
    counted,
    differ,
    fresh,
    in_order,
    roots_of,
    viewed,
)
from torchprobe.capture.attention.tape import Node
from torchprobe.capture.attention.writes import chosen, convolved, copied, cut, lost, picked, written


class Labelling:
    """The labels of a pass's tensors."""

    def of(self, node: Node) -> Label:
        """The label of a tensor, and first of those that it was made of: not by recursion, for models are deep."""
        waiting = [] if node.label else [node]
        while waiting:
            top = waiting[-1]
            unknown = [] if top.label or top.const else [one for one in top.inputs if one.label is None]
            waiting += unknown
            if not unknown:
                waiting.pop()
                if top.label is None:
                    top.take_label(self._made(top))
        assert node.label is not None
        return node.label

    def _made(self, node: Node) -> Label:
        inputs = () if node.const else node.inputs
        if node.func is None or not inputs:
            return fresh(node.shape)
        found = self._by_table(node, inputs)
        if found is None or len(found.dims) != node.dims:
            labels = [_label(one) for one in inputs]
            return fresh(node.shape, lost=lost(node, labels), picked=picked(node, labels))
        return _settled(found)

    def _by_table(self, node: Node, inputs: tuple[Node, ...]) -> Label | None:
        func, first = node.func, inputs[0]
        assert func is not None
        product = product_of(node)
        if product is not None:
            return self._product(node, product) if len(product.factors) == 2 else _of_several(node, product)
        reduces = func in fn.EXTREMES and not isinstance(node.argument(1, "dim", node), Node)
        rule = joins.reduced if reduces else _RULES.get(func)
        if rule is not None:
            return rule(node, _label(first)) or _along(node, inputs)
        if func in fn.ALONG:
            return _label(first) if first.shape == node.shape else None
        if fn.is_pointwise(func):
            return chosen(node, inputs, _pointwise(node, inputs))
        return _view(node, inputs) or _along(node, inputs)

    # ---- products

    def _product(self, node: Node, product: Product) -> Label:
        labels = [_label(factor) for factor in product.factors]
        const = [factor.const for factor in product.factors]
        if any(root.side is not None and not root.fixed for i in (0, 1) for root in _summed(product, labels, i)):
            return _joined(product, [unsided(label) for label in labels], const)  # weights and values
        own = [product.own(i) for i in (0, 1)]
        if any(const) and (any(label.sides for label in labels) or not _may_choose(product, const, own)):
            made = _joined(product, labels, const)
            return made if all(const) else Label(made.dims, made.at, labels[const.index(False)].between)
        sided = [self._sided(label, own[i], i, const[i]) for i, label in enumerate(labels)]
        left, right = (tuple(sided[i].dims[axis] for axis in own[i]) for i in (0, 1))
        made = _joined(product, sided, const)
        at = {**sided[0].at, **sided[1].at}
        projected = all(root.learned for i in (0, 1) for root in _summed(product, labels, i))
        outer = all(product.factors[i].shape[axis] == 1 for i in (0, 1) for axis in product.summed(i))
        shared = ([label.dims[axis] for axis in product.shared(i)] for i, label in enumerate(labels))
        elsewhere = not any(const) and differ(*shared)
        between = Between(left, right, at, projected, outer, node.caller, elsewhere, any(const))
        return Label(made.dims, {**at, **made.at}, between)

    def _sided(self, label: Label, own: list[int], side: int, const: bool) -> Label:
        """Its own dimensions, and all that it is pinned to, as roots of this side."""
        plain = unsided(label)
        other = {root: root.on(side, const) for root in {*plain.roots(), *plain.at}}
        dims = tuple(
            tuple(f._replace(root=other.get(f.root, f.root)) for f in dim) if axis in own else dim  # type: ignore[arg-type]
            for axis, dim in enumerate(plain.dims)
        )
        return Label(dims, {**plain.at, **{other[root]: value for root, value in plain.at.items()}})


def _of_several(node: Node, product: Product) -> Label:
    """Of more factors than two: what the result keeps of them."""
    dims: list[Dim] = []
    labels = [unsided(_label(factor)) for factor in product.factors]
    for name, size in zip(product.result, node.shape, strict=True):
        where = next(((i, names.index(name)) for i, names in enumerate(product.names) if name in names), None)
        dims.append(labels[where[0]].dims[where[1]] if where else counted(Root(), size))
    return Label(tuple(dims), {root: value for label in labels for root, value in label.at.items()})


def _label(node: Node) -> Label:
    return node.label or node.take_label(fresh(node.shape))


def unsided(label: Label) -> Label:
    """The same where it does not matter any more which factor of a product a dimension comes from."""
    if not label.sides and label.between is None:
        return label
    dims = tuple(tuple(f._replace(root=f.root and f.root.lowest) for f in dim) for dim in label.dims)
    kept = set(roots_of(dims))
    at = {root: value for root, value in label.at.items() if root.side is None}
    return Label(dims, at | {root.lowest: value for root, value in label.at.items() if root.lowest in kept})


def _settled(label: Label) -> Label:
    """Without sides once one of both is gone, and pinned to nothing that does not matter."""
    if label.between is not None and any(_is_gone(label, side) for side in (0, 1)):
        label = unsided(label)
    counts = set(label.roots())
    if label.between is not None or len(label.at) <= len(counts):
        return label
    at = {root: value for root, value in label.at.items() if root in counts or root.side is None}
    return Label(label.dims, at, label.between)


def _is_gone(label: Label, side: int) -> bool:
    """Whether nothing is left of a factor's own dimensions, not even that one of their indices was picked."""
    assert label.between is not None
    own = set(roots_of(label.between.of(side)))
    return bool(own) and side not in label.sides and own.isdisjoint(label.at)


def _summed(product: Product, labels: list[Label], which: int) -> Iterable[Root]:
    return roots_of(labels[which].dims[axis] for axis in product.summed(which))


def _may_choose(product: Product, const: list[bool], own: list[list[int]]) -> bool:
    """Whether parameters may be queries: they come first, or share a dimension, such as heads, with what they meet."""
    if all(const) or not all(own):
        return False
    shared = set(product.names[0]) & set(product.names[1]) & set(product.result)
    return bool(shared) or (const[0] and "columns" in product.result)


def _joined(product: Product, labels: list[Label], const: list[bool]) -> Label:
    """The dimensions of a product. What only parameters have is new, and learned."""
    dims: list[Dim] = []
    at: dict[Root, int] = {}
    order = (1, 0) if const[0] else (0, 1)
    features = {root for i in (0, 1) for root in _summed(product, labels, i) if not const[i] and root.side is None}
    features = features if len(features) == 1 else set()  # of several it was a patch, not the width of heads
    layer = any(fn.parameters_of(product.factors[i]) is not None for i in (0, 1) if const[i])  # else queries were made
    for name in product.result:
        where = [(i, product.names[i].index(name)) for i in order if name in product.names[i]]
        size = max(product.factors[i].shape[axis] for i, axis in where)
        whole = [pair for pair in where if product.factors[pair[0]].shape[pair[1]] == size]
        which, axis = min(whole, key=lambda pair: joins.is_expanded(labels[pair[0]].dims[pair[1]]))
        dim = labels[which].dims[axis]
        if const[which] and not all(const) and not any(root.side is not None for root in roots_of([dim])):
            dim = counted(Root(learned=True, made=fn.parameters_of(product.factors[which])), size)
        elif layer and not features.isdisjoint(roots_of([dim])):  # heads of what is summed
            dim = tuple(f._replace(root=Root(learned=True)) if f.root in features else f for f in dim)
        dims.append(dim)
    for i in order:
        gone = set(_summed(product, labels, i))
        held = {} if const[i] and not all(const) else labels[i].at
        pinned = {r: v for r, v in held.items() if r not in gone and not (r.learned and any(const))}
        at = {**pinned, **at}
    kept = set(roots_of(dims))
    for label in labels:
        at |= {root: value for root, value in label.at.items() if root in kept}
    return Label(tuple(dims), {**dict.fromkeys(kept, 0), **at})


# ---- the others


def _embedded(node: Node, first: Label) -> Label | None:
    ids, root = node.args[0], Root(learned=True)
    if not isinstance(ids, Node):
        return None
    label = _label(ids)
    return Label((*label.dims, counted(root, node.shape[-1])), {**label.at, root: 0})


def _attended(node: Node, first: Label) -> Label | None:
    query, value = node.argument(0, "query"), node.argument(2, "value")
    if not (isinstance(query, Node) and isinstance(value, Node)):
        return None
    of_query, of_value = unsided(_label(query)), unsided(_label(value))
    return Label((*of_query.dims[:-1], of_value.dims[-1]), {**of_value.at, **of_query.at})


def _along(node: Node, inputs: tuple[Node, ...]) -> Label | None:
    """All dimensions but those that a function sorts, transforms or picks along."""
    axes, of = fn.along(node), next((one for one in inputs if not one.const and one.dims == node.dims), None)
    if not axes or of is None or any(one.dims != node.dims and one.dtype.is_floating_point for one in inputs):
        return None
    labels = [_label(one) for one in inputs]
    label, new = _label(of), fresh(node.shape, picked=picked(node, labels))
    if lost(node, labels) or any(of.shape[i] != size for i, size in enumerate(node.shape) if i not in axes):
        return None
    dims = tuple(new.dims[i] if i in axes else dim for i, dim in enumerate(label.dims))
    gone = {*label.roots()} - {*roots_of(dims)}
    return Label(dims, {**{root: value for root, value in label.at.items() if root not in gone}, **new.at})


_RULES: Mapping[Any, joins.Rule] = {
    **joins.RULES,
    **dict.fromkeys(fn.WRITES, written),
    **dict.fromkeys(fn.COPIES, copied),
    **dict.fromkeys(fn.CONVOLUTIONS | fn.POOLS, convolved),
    **dict.fromkeys(fn.named("embedding"), _embedded),
    **dict.fromkeys(fn.named("view_as_complex", "view_as_real"), joins.as_complex),
    **dict.fromkeys(FUNCTIONS, _attended),
}


def _view(node: Node, inputs: tuple[Node, ...]) -> Label | None:
    """What is the same memory, or the same elements in the same order."""
    for one in inputs:
        if one in node.sharing:
            return cut(node, one) or viewed(_label(one), one.memory, node.memory)
        if one.storage == node.storage != 0 and one.shape == node.shape:  # the real parts, or the bits
            return _label(one)
    if node.func in fn.RESHAPES or node.func in fn.SAME:
        return viewed(_label(inputs[0]), in_order(inputs[0].shape), in_order(node.shape))
    return None


def _pointwise(node: Node, inputs: tuple[Node, ...]) -> Label | None:
    """Of several that broadcast, logits say what a dimension is, then what is no constant."""

    def rank(one: Node) -> tuple[bool, ...]:  # a mask comes last
        sides, table, whole = _label(one).sides, fn.is_of_table(one), one.shape == node.shape
        logits = not sides or table, table or not whole, not sides  # also of one query and one key
        return *logits, one.const, not one.dtype.is_floating_point, not whole

    ranked = sorted((one for one in inputs if one.dims), key=rank)
    if not ranked or max(one.dims for one in ranked) > node.dims:  # the largest of all elements
        return fresh(node.shape)
    turned = [one for one in ranked if not one.const and _is_turned(_label(one), _label(ranked[0]))]
    ranked.sort(key=lambda one: one not in turned)
    first = _label(ranked[0])
    dims: list[Dim] = [()] * node.dims
    for one in reversed(ranked):
        offset = node.dims - one.dims
        for axis, dim in enumerate(_label(one).dims):
            dim = counted(Root(learned=True), one.shape[axis]) if one.const and first.sides else dim
            if one.shape[axis] == node.shape[offset + axis] and not (joins.is_expanded(dim) and dims[offset + axis]):
                dims[offset + axis] = dim
    counts = {*roots_of(dims)}
    at = {root: value for one in reversed(ranked) for root, value in _label(one).at.items() if root in counts}
    if any(_disagree(first, dims, _label(one), node.dims - one.dims) for one in ranked[1:]):
        return None
    return Label(tuple(dims), {**at, **first.at}, first.between)


def _is_turned(of: Label, by: Label) -> bool:
    """Whether features stand where queries or keys would of what only looks like logits: angles, an outer product."""
    pairs = [({*roots_of([a])}, {*roots_of([b])}) for a, b in zip(of.dims[::-1], by.dims[::-1], strict=False)]
    features = any(any(one.learned for one in a) and any(one.side is not None for one in b) for a, b in pairs)
    outer = by.between is not None and by.between.outer and len(by.dims) <= len(of.dims)
    return features and outer and not of.sides and all(a or not b for a, b in pairs)


def _disagree(first: Label, dims: list[Dim], other: Label, offset: int) -> bool:
    """Whether logits of the same product meet whose dimensions are others, or begin elsewhere."""
    if not first.sides or not other.sides or first.between is None:
        return False
    mine = set(roots_of((*first.between.left, *first.between.right)))
    for axis, dim in enumerate(other.dims):
        if dim and dim != dims[offset + axis] and mine & set(roots_of([dim])):
            return True
    return any(first.at.get(root, 0) != other.at.get(root, 0) for root in mine & set(other.roots()))
