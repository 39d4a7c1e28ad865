"""Explains NaN and inf in host memory from what an ordinary step leaves behind: the graph, gradients, parameters.

Runs once, when they are first seen, and reads values freely: it is for tensors in host memory only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchprobe.capture.compat import saved_tensors_are_readable, sequence_number
from torchprobe.capture.outputs import is_numeric
from torchprobe.naming import owner_of
from torchprobe.statistics.dtypes import on_host

NO_MODULE = "(loss)"
_RAW = "_raw_saved_"
_RESULTS = ("result", "output")
_OF_MODULE = ("weight", "mat2", "bias", "running", "attn_")  # what operations call a module's own tensors, and masks
_MOVES = (
    *("TBackward", "Transpose", "Permute", "View", "UnsafeView", "Reshape", "AsStrided"),
    *("Expand", "Unsqueeze", "Squeeze", "ToCopy", "Alias", "Clone"),
)  # operations that only move or cast numbers
_NAMES = 3  # in a message
_MOST_NODES = 50_000
_REACH = 4  # nodes between an operation and a parameter that it uses: a transposition, a cast

READS_GRAPHS = saved_tensors_are_readable()
"""Whether what a graph keeps can be looked at without running hooks; not in torch 2.6."""

_Named = Sequence[tuple[str, nn.Parameter]]


class Finding(NamedTuple):
    """Which module, and what it did."""

    where: str
    text: str


def of_parameters(named: _Named) -> Finding | None:
    """Parameters that are not finite, when a forward pass uses them."""
    bad = [name for name, p in named if not _finite(p)]
    if not bad:
        return None
    text = f"{_listed(bad)} held NaN or inf before the forward pass, as the optimizer's last update left them"
    return Finding(bad[0], text)


def of_gradients(named: _Named) -> Finding | None:
    """The last module, in the model's order, whose gradients are not finite: where the backward pass met them first."""
    states = [(owner_of(name), _finite(p.grad)) for name, p in named if p.grad is not None]
    bad = [module for module, finite in states if not finite]
    if not bad:
        return None
    if len(bad) == len(states):
        text = (
            f"gradients of all parameters are NaN or inf though the model's output is finite: they come from the loss, "
            f"or from the backward pass of {bad[-1]}"
        )
        return Finding(NO_MODULE, text)
    last = max(i for i, (_, finite) in enumerate(states) if not finite)
    following = next((module for module, _ in states[last + 1 :] if module != bad[-1]), None)
    after = "" if following is None else f", and {following} behind it a finite one"
    return Finding(bad[-1], f"the backward pass gave {bad[-1]} a gradient with NaN or inf{after}")


def of_output(named: _Named, outputs: Sequence[Tensor]) -> Finding | None:
    """The module at which a forward pass first held NaN or inf, from the tensors that its graph keeps."""
    damaged = of_parameters(named)
    if damaged is not None:
        return damaged
    if not READS_GRAPHS:
        text = f"the model's output holds {_kind(outputs)}; a later torch than {torch.__version__} tells where from"
        return Finding(NO_MODULE, text)
    graph = _Graph(outputs, {id(p): owner_of(name) for name, p in named})
    for i in range(len(graph.nodes)):
        inputs, results = graph.saved(i)
        if not all(map(_sound, inputs)):
            before = graph.before(i)
            if not before:
                return Finding(NO_MODULE, f"the model's input holds {_kind(inputs)}")
            return _blamed(graph, max(before), _kind(inputs))
        if not all(map(_sound, results)):
            return _blamed(graph, i, _kind(results))
    return _blamed(graph, len(graph.nodes) - 1, _kind(outputs)) if graph.nodes else None


class _Graph:
    """The operations of a forward pass in the order in which they ran, as autograd keeps them."""

    def __init__(self, outputs: Sequence[Tensor], modules: Mapping[int, str]) -> None:
        nodes = _reached(t.grad_fn for t in outputs)
        self.owners = {node: owner for node in nodes for owner in _modules_of(node, modules)}
        plumbing = {following for node in nodes for following, _ in node.next_functions if _leaf(following) is not None}
        self.nodes = sorted((n for n in nodes if n not in plumbing), key=lambda node: sequence_number(node) or 0)
        self._index = {node: i for i, node in enumerate(self.nodes)}

    def before(self, i: int) -> list[int]:
        """The operations whose results operation `i` works on."""
        return [self._index[node] for node, _ in self.nodes[i].next_functions if node in self._index]

    def saved(self, i: int) -> tuple[list[Tensor], list[Tensor]]:
        """Tensors that operation `i` keeps: of what it was given, and of what it made."""
        kept = list(_saved(self.nodes[i]))
        results = [t for name, t in kept if name.startswith(_RESULTS)]
        return [t for name, t in kept if not name.startswith(_RESULTS)], results

    def data(self, i: int) -> list[Tensor]:
        """What operation `i` keeps of the numbers that run through the model."""
        return [t for name, t in _saved(self.nodes[i]) if not name.startswith((*_RESULTS, *_OF_MODULE))]


def _blamed(graph: _Graph, i: int, made: str) -> Finding:
    """The module of an operation, or the latest one among those whose results led to it."""
    queue, between = {i}, ""
    seen: set[int] = set()
    while queue:
        latest = max(queue)
        seen.add(latest)
        node = graph.nodes[latest]
        owner = graph.owners.get(node)
        if owner is not None:
            origin = _origin(graph, latest)
            if origin != latest:  # it was given -inf, which it made NaN or inf of
                finding = _blamed(graph, origin, "-inf")
                return Finding(finding.where, f"{finding.text}, which became {made} in {owner}")
            what = f"{owner}, or what is done to its output ({between})," if between else owner
            return Finding(owner, f"{what} produced {made} from {_range(graph, latest)} in the forward pass")
        between = between or ("" if _moves_only(node) else node.name().removesuffix("Backward0"))
        queue = (queue | set(graph.before(latest))) - seen
    return Finding(NO_MODULE, f"an operation on the model's input ({between}) produced {made}")


def _origin(graph: _Graph, i: int) -> int:
    """From an operation that was given -inf back to the one that made it of finite numbers."""
    while not all(map(_finite, graph.data(i))) and (before := graph.before(i)):
        i = max(before)
    return i


def _range(graph: _Graph, i: int) -> str:
    largest = [on_host(t.abs().max()) for t in graph.data(i) if t.numel() and _finite(t)]
    return f"finite inputs (max |x| = {max(largest):.3g})" if largest else "finite inputs"


def _moves_only(node: Any) -> bool:
    return bool(node.name().startswith(_MOVES))


def _reached(starts: Iterable[Any]) -> list[Any]:
    nodes: dict[Any, None] = {}
    queue = [node for node in starts if node is not None]
    while queue and len(nodes) < _MOST_NODES:
        node = queue.pop()
        if node not in nodes:
            nodes[node] = None
            queue += [following for following, _ in node.next_functions if following is not None]
    return list(nodes)


def _leaf(node: Any) -> Any:
    """The parameter that a chain of transpositions and casts leads to, or None."""
    for _ in range(_REACH):
        if node is None or hasattr(node, "variable"):
            return None if node is None else node.variable
        node = node.next_functions[0][0] if _moves_only(node) else None
    return None


def _modules_of(node: Any, modules: Mapping[int, str]) -> list[str]:
    leaves = [_leaf(following) for following, _ in node.next_functions]
    return [modules[id(leaf)] for leaf in leaves if leaf is not None and id(leaf) in modules]


def _saved(node: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a node keeps, as they are: never through a hook, which could run the model again."""
    for name in dir(node):
        if name.startswith(_RAW):
            raw = getattr(node, name)
            for one in raw if isinstance(raw, list | tuple) else [raw]:
                value = one.data if getattr(one, "unpack_hook", one) is None else None
                if isinstance(value, Tensor) and is_numeric(value) and value.is_cpu:
                    yield name.removeprefix(_RAW), value.detach()


def _finite(x: Tensor) -> bool:
    return bool(on_host(torch.isfinite(x.detach()).all()))


def _sound(x: Tensor) -> bool:
    """Neither NaN nor inf; -inf is what masks are made of."""
    return not on_host((x.detach().isnan() | (x.detach() == torch.inf)).any())


def _kind(tensors: Iterable[Tensor]) -> str:
    return "NaN" if any(on_host(t.detach().isnan().any()) for t in tensors) else "inf"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMES]) + (f" and {len(names) - _NAMES} more parameters" if len(names) > _NAMES else "")
