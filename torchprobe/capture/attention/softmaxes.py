"""The softmax of an attention that is written out: its logits, read when it is met, so that they are not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from torchprobe.capture.attention import functions as fn
from torchprobe.capture.attention.labelling import Labelling
from torchprobe.capture.attention.labels import Label, leaves
from torchprobe.capture.attention.layout import Arrangement, Refused, alike, arrangement, blocked, plain
from torchprobe.capture.attention.observer import Call, Observer, unusual
from torchprobe.capture.attention.sites import INSIDE_GRAPH, Reading
from torchprobe.capture.attention.tape import Node
from torchprobe.capture.attention.uses import Flow, Kind, Pending, changes, meets_scores
from torchprobe.capture.compat import under_transform
from torchprobe.statistics.attention import Logits
from torchprobe.statistics.attention.keys import NEVER_A_LOGIT, WITH_A_MASK

_STEPS = 40  # calls between a softmax and the product behind it


class Softmaxes:
    """Finds the logits of softmaxes, and reads them."""

    def __init__(self, observer: Observer, labels: Labelling) -> None:
        self._observer = observer
        self._labels = labels

    def of_call(self, node: Node, x: Tensor, out: bool) -> Flow | None:
        """What the result of a softmax, or of something like it, holds: None where it is no attention's.

        x: its argument.
        """
        func, source = node.func, node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(source, Node):
            return None
        kind: Kind = "logarithms" if func in fn.LOG_SOFTMAXES else "weights"
        axis = node.argument(1, "dim")
        if func in fn.DRAWN:
            axis = node.argument(4, "dim", -1) if func in fn.GUMBEL else -1 if axis is None else axis
            return self._pending(source, None, axis, kind)
        if func in fn.POWERS:
            return self._pending(source, None, -1, "exponentials")
        if func in fn.EXPONENTIALS:
            summed = _log_sum(source)
            if summed is not None:
                return self._pending(source, x, summed, kind)
            kind, axis = "exponentials", -1
        if not isinstance(axis, int) or not source.dims:
            return None
        return self._pending(source, x, axis, kind, "whose softmax writes into `out`" if out else None)

    def _pending(self, source: Node, x: Tensor | None, axis: int, kind: Kind, reason: str | None = None) -> Flow | None:
        axis %= source.dims
        label = self._labels.of(source)
        if axis not in source.kept:
            source.kept[axis] = arrangement(label, source.shape, axis)
        arranged: Arrangement | Refused | None = source.kept[axis]
        if arranged is None:
            return None
        call = self._call(label, arranged, axis - source.dims)
        if call is None:
            return None
        if call.places is not None and call.places.open and not any(map(_mask, _steps(source))):
            call = replace(call, places=replace(call.places, unknown=True))
        keys = frozenset(leaves([label.dims[axis]]))
        reason = reason and f"the attention of {call.caller.name}, {reason}"
        reason = reason or ("torch.func transforms" if under_transform() else self._unusual(x))
        if isinstance(arranged, Refused):
            reason = reason or f"the attention of {call.caller.name}, {arranged.reason}"
            return Flow(kind, (Pending(call, None, None, reason, keys, (source, axis)),))
        reading = None if x is None or reason is not None else self._read(x, source, arranged, call)
        return Flow(kind, (Pending(call, reading, arranged, reason, keys, (source, axis)),), changed=x is None)

    def _unusual(self, x: Tensor | None) -> str | None:
        return unusual(x)

    def _call(self, label: Label, arranged: Arrangement | Refused, axis: int) -> Call | None:
        caller = (label.between.caller if label.between else None) or self._observer.owners.caller()
        if caller is None or caller is INSIDE_GRAPH:
            return None
        if axis != -1:  # not the site of the usual one
            caller = caller._replace(path=(*caller.path, ("", "softmax over dimension", axis)))
        if isinstance(arranged, Arrangement) and arranged.side == 0:  # one product may be an attention both ways
            caller = caller._replace(path=(*caller.path, ("", "keys are the first factor", 0)))
        places = arranged.places if isinstance(arranged, Arrangement) else None
        return Call(caller, places is not None and places.cross, places)

    def _read(self, logits: Tensor, source: Node, arranged: Arrangement, call: Call) -> Reading:
        heads, before = call.caller.heads, _steps(source)
        for hidden in _masks(before, source, arranged):
            self._observer.padding.note(arranged.places, hidden)
        added = is_added_to(source)
        limit = WITH_A_MASK if added else NEVER_A_LOGIT
        x, hiding = plain(logits), _hiding(before, limit)
        x = x if hiding is None else x.masked_fill(x <= hiding, -torch.inf)
        given, others = arranged.split(arranged.by_head(x, heads))
        if any(_is_of_queries(node, arranged) for node in before):
            self._observer.padding.note(arranged.places, alike(blocked(given, limit)))
        self._observer.padding.hold_against(arranged.places, given, limit)
        taken = [each if each is None else arranged.by_row(plain(each), heads) for each in shifts(before, source)]
        known = [each for each in taken if each is not None]
        shift = sum(known[1:], known[0]) if known else None
        sinks = None if others is None else others.float().logsumexp(-1, keepdim=True)
        padding = self._observer.padding.of(arranged.places, given.size(0), given.size(2))
        of = Logits(given, padding, arranged.places.on(given.device), shift, sinks, masked=added)
        reading = self._observer.read(call, of)._replace(who=arranged.who)
        return reading.with_logits_of(None) if len(known) < len(taken) else reading

    def read_weights(self, weights: Tensor, source: Node, axis: int, flow: Flow) -> Reading | str:
        """The statistic of weights as they are used; or why there is none."""
        arranged = arrangement(self._labels.of(source), source.shape, axis, as_used=True)
        call = flow.first.call
        refused = flow.refused or (arranged.reason if isinstance(arranged, Refused) else None)
        if refused is not None or arranged is None or isinstance(arranged, Refused):
            return refused or "whose weights are rearranged"
        given = arranged.by_head(plain(weights), call.caller.heads)
        negative = (given < 0).any()
        if negative.is_cpu and negative.numpy():  # in host memory: no wait
            return "some of whose weights are negative"
        given = (given if given.dtype == torch.float64 else given.float()).log().masked_fill(negative, torch.nan)
        padding = self._observer.padding.of(arranged.places, given.size(0), given.size(2))
        as_used = Logits(given, padding, arranged.places.on(given.device), as_weights=True)
        reading = self._observer.read(call, as_used)._replace(who=arranged.who)
        before = None if len(flow.pending) > 1 else flow.first.reading
        return reading.with_logits_of(before)


# ---- between a product and its softmax


def _steps(logits: Node) -> list[Node]:
    """The last of them, as far as logits are changed element by element."""
    return list(islice(changes(logits, logits.shape), _STEPS))


def shifts(before: list[Node], source: Node) -> Iterator[Tensor | None]:
    """What was taken off each row, as its largest logit is against overflow; None where it cannot be put on again."""
    scale = 1.0  # of what stands at the softmax to what it was taken off
    for node in before:
        taken = node.args[1] if node.func in fn.DIFFERENCES and len(node.args) > 1 else None
        while isinstance(taken, Node) and taken.func in fn.EXPANSIONS:
            taken = taken.inputs[0]
        if isinstance(taken, Node) and _is_of_row(taken, source):
            small = taken.small if scale else None
            yield None if small is None else (small * scale).expand(*source.shape[:-1], 1)
        scale *= _scale(node)


def _scale(node: Node) -> float:
    """By which number a call multiplies logits; 0 where it does something else with them."""
    if node.func in fn.SAME | fn.ADDITIONS | fn.FILLS | fn.CHOICES | fn.RESHAPES | fn.DIFFERENCES:
        return 1.0
    by = node.args[1] if len(node.args) == 2 else None
    if not isinstance(by, int | float) or not by:
        return 0.0
    return by if node.func in fn.MULTIPLICATIONS else 1 / by if node.func in fn.DIVISIONS else 0.0


def is_shifted(pending: Pending, label_of: Callable[[Node], Label]) -> bool:
    """Whether logits are relative to something that is made of them, as in a softmax."""
    logits = pending.of[0] if pending.of is not None else None
    others = [one for one in logits.inputs if not one.is_logits] if logits and logits.func in fn.DIFFERENCES else []
    return any(meets_scores(one, pending, label_of) for one in others)


def _is_of_row(taken: Node, source: Node) -> bool:
    rows, shape = (*source.shape[:-1], 1), taken.shape or (1,) * source.dims  # of all logits
    if len(shape) != len(rows) or any(a not in (1, b) for a, b in zip(shape, rows, strict=True)):
        return False
    for _ in range(4):
        if taken.func in fn.EXTREMES | fn.LOG_SUMS | fn.LARGEST:
            return (shape == rows and source.shape[-1] > 1) or any(one.is_logits for one in taken.inputs)
        if not taken.inputs:
            return False
        taken = taken.inputs[0]
    return False


def _log_sum(source: Node) -> int | None:
    """The dimension of the softmax in exp(x - logsumexp(x))."""
    if source.func not in fn.DIFFERENCES or len(source.args) < 2:
        return None
    x, taken = source.args[:2]
    while isinstance(taken, Node) and (taken.func in fn.SAME or taken.func in fn.UNSQUEEZES):
        taken = taken.args[0]
    if not (isinstance(taken, Node) and taken.func in fn.LOG_SUMS and taken.args and taken.args[0] is x):
        return None
    axis = taken.argument(1, "dim")
    axis = axis[0] if isinstance(axis, list | tuple) and len(axis) == 1 else axis
    return axis if isinstance(axis, int) else None


def _hiding(before: list[Node], limit: float = NEVER_A_LOGIT) -> float | Tensor | None:
    """What a logit hides its key at, where it was scaled after it was masked; None where that is as ever."""
    scale: Any = 1.0
    found: Any = None
    for node in before:
        if node.func in fn.MULTIPLICATIONS | fn.DIVISIONS:
            tensors = [one.small for one in node.inputs if not one.is_logits]
            by = next((one for one in (*tensors, *node.args) if isinstance(one, int | float | Tensor)), None)
            if by is None or not (node.func in fn.MULTIPLICATIONS or node.inputs[0].is_logits):
                break
            scale = scale * by if node.func in fn.MULTIPLICATIONS else scale / by
        elif _mask(node) is not None:
            if found is not None and found is not scale:
                return None
            found = scale
    return None if found is None or (isinstance(found, float) and found == 1) else found * limit


def _masks(before: list[Node], source: Node, arranged: Arrangement) -> Iterator[Tensor]:
    """The masks on logits that are one for all heads and queries, as bool (batch, keys): True is hidden."""
    for node in before:
        operand, hides = _mask(node) or (None, True)
        if operand is None or operand.small is None or operand.dims != node.dims or not arranged.is_plain_batch:
            continue
        small, shape, ends = operand.small, operand.shape, (operand.shape[0], operand.shape[-1])
        if ends == (source.shape[0], source.shape[-1]) and not any(n > 1 for n in shape[1:-1]):
            hidden = small if small.dtype is torch.bool else blocked(small)
            yield arranged.split(plain(hidden if hides else ~hidden).reshape(ends))[0]


def _is_of_queries(node: Node, arranged: Arrangement) -> bool:
    """Whether a mask has an entry for each sequence, and each query or what is not known to be one."""
    mask = (_mask(node) or (node,))[0]
    by_sequence = mask is not node and mask.dims == node.dims and mask.shape[0] > 1 and mask.memory.strides[0] != 0
    return by_sequence and (not arranged.is_plain_batch or any(n > 1 for n in mask.shape[1:-1]))


def is_added_to(logits: Node) -> bool:
    """Whether something that may be a mask was added to a product on the way to a softmax."""
    return any(map(_is_added_to, islice(changes(logits), _STEPS)))


def _is_added_to(node: Node) -> bool:
    """Whether a call adds something to logits."""
    if node.func in fn.PRODUCTS:
        return fn.PRODUCTS[node.func] > 0
    return node.func in fn.ADDITIONS and any(not one.is_logits for one in node.inputs)


def _mask(node: Node) -> tuple[Node, bool] | None:
    """What a call masks with, and whether that is true for a hidden key."""
    args: Any = node.args
    if node.func in fn.FILLS:
        mask: Any = node.argument(1, "mask")
        return (mask, True) if isinstance(mask, Node) else None
    if node.func in fn.CHOICES and len(args) == 3 and isinstance(args[0], Node):
        return args[0], not (isinstance(args[1], Node) and args[1].is_logits)
    if node.func in fn.ADDITIONS:
        return next(((one, True) for one in node.inputs if not one.is_logits), None)
    return None


# ---- inside a compiled graph


def unreadable(source: Node, arranged: Arrangement) -> str | None:
    """Why logits cannot be read inside a compiled graph, by themselves alone; None where they can."""
    if arranged.latent:
        return "whose queries are parameters, in a compiled graph"
    if isinstance(arranged.places.index, Tensor):
        return "whose keys are written into a cache, in a compiled graph"
    if arranged.places.unknown:
        return "whose queries stand where it is not known, in a compiled graph"
    if _hiding(_steps(source)) is not None:
        return "whose masks are scaled, in a compiled graph"
    if any(True for _ in shifts(_steps(source), source)):
        return "whose logits are shifted, in a compiled graph"
    if any(_tells_sequences_apart(node, source, arranged) for node in changes(source)):
        return "in a compiled graph, whose mask may differ between sequences: which queries are padding is not told"
    return None


def _tells_sequences_apart(node: Node, logits: Node, arranged: Arrangement) -> bool:
    """Whether what a call masks with, or adds, may be another one for each sequence of a batch."""
    dims = [axis for axis, digits in enumerate(arranged.sizes) for _ in digits]
    batch = {dims[place] for place in arranged.order[0]}
    for one in _beside(node):
        before = len(logits.shape) - one.dims
        varies = [n > 1 and step != 0 for n, step in zip(one.shape, one.memory.strides, strict=True)]
        if node.shape != logits.shape and (not one.const or any(varies[:-2])):  # which dimension is which, is not known
            return True
        if any(varies[axis - before] for axis in batch if axis >= before):
            return True
    return False


def _beside(node: Node) -> list[Node]:
    """What changes logits, or is added to a product of them."""
    if node.func in fn.PRODUCTS:
        return list(node.inputs[: fn.PRODUCTS[node.func]])
    return [one for one in node.inputs if not one.is_logits]
