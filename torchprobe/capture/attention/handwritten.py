"""Attention that is written out: a product of two activations, a softmax over its last dimension, a product again.

Logits are followed from the first product through what keeps their shape. Statistics are computed at the softmax,
from its input, so that no logits are kept; they count when a product sums the weights over the keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.capture.attention import functions as fn
from torchprobe.capture.attention.functions import EITHER, Args, Function, Kwargs
from torchprobe.capture.attention.layout import by_head, is_cross, plain, source_of, unusual
from torchprobe.capture.attention.observer import Call, Observer
from torchprobe.capture.attention.sites import INSIDE_GRAPH, Reading, common_owner
from torchprobe.capture.attention.tags import LEARNED, Exponentials, LogWeights, Pending, Scores, Tags, Total, Weights
from torchprobe.capture.compat import under_transform

_CHANGED = "a softmax by exp and sum whose exponentials are changed in between"
_KINDS = (Weights, Exponentials, Scores, Total)
"""Which tag is followed where a function takes several."""


class Handwritten:
    """Follows logits and weights through a pass."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._tags = Tags()

    def forget(self) -> None:
        """The pass is over."""
        self._tags.clear()

    def after(self, func: Function, args: Args, kwargs: Kwargs, result: Any, within: Call | None) -> None:
        """Look at a call of one of `functions`; within: the call that it is a part of, where that is known."""
        if func in fn.PRODUCTS:
            if _is_layer(args) and not self._has_tagged(args, kwargs):
                return
            with self._observer.guard():
                self._after_product(func, args, kwargs, result, within)
        elif func in fn.SOFTMAXES or func in fn.LOG_SOFTMAXES or func in fn.EXPONENTIALS:
            x: Any = args[0] if args else kwargs.get("input")
            tag = self._tags.of(x)
            if isinstance(tag, LogWeights) and func in fn.EXPONENTIALS:
                self._tags.put(result, tag.weights)
            elif isinstance(tag, Scores):
                with self._observer.guard():
                    self._after_softmax(func, x, tag, args, kwargs, result)
        elif self._concerns(args, kwargs):
            with self._observer.guard():
                self._after_carrier(func, args, kwargs, result)

    # ---- the two products

    def _after_product(self, func: Function, args: Args, kwargs: Kwargs, result: Any, within: Call | None) -> None:
        equation, operands = fn.operands(func, args, kwargs)
        if len(operands) != 2 or not isinstance(result, Tensor):
            return
        tags = [self._tags.of(operand) for operand in operands]
        for position, tag in enumerate(tags):
            if isinstance(tag, Weights | Scores | Exponentials):
                self._after_use(equation, position, tag, result, within)
        if result.dim() < 2 or any(isinstance(tag, Weights | Scores | Exponentials) for tag in tags):
            return
        learned = [self._is_learned(operand) for operand in operands]
        roles = fn.roles(equation, learned, min(operand.dim() for operand in operands))
        call = within or self._call(operands, result, any(learned)) if roles else None
        if call is not None:
            self._tags.put(result, Scores(call, roles))

    def _after_use(self, equation: str | None, position: int, tag: Any, result: Tensor, within: Call | None) -> None:
        """Weights or logits have been multiplied with something: with values, or among heads."""
        axis = tag.axis if isinstance(tag, Weights) else -1
        kept = fn.axis_in_output(equation, position, axis) if equation else None
        sums = fn.is_summed(equation, position, axis) if equation else axis == -1 - position
        if isinstance(tag, Exponentials):
            if sums and not tag.multiplied:
                self._tags.put(result, Exponentials(tag.pending, multiplied=True))
        elif isinstance(tag, Weights):
            if sums:
                self._commit(tag.pending, within)
            elif kept is not None:
                self._tags.put(result, Weights(tag.pending, kept))
        elif equation and kept == -1 and fn.axis_in_output(equation, position, -2) == -2:
            self._tags.put(result, tag)

    def _commit(self, pending: Pending, within: Call | None = None) -> None:
        reading, pending.reading = pending.reading, None
        reason, pending.reason = pending.reason, None
        if reason is not None:
            self._observer.uncovered.add(reason)
        if reading is None:
            return
        here = (within and within.caller) or self._observer.owners.caller()
        if here is INSIDE_GRAPH:
            return
        name = pending.call.caller.name
        self._observer.record(pending.call, reading, common_owner(name, here.name) if here else name)

    def _is_learned(self, operand: Tensor) -> bool:
        if isinstance(operand, nn.Parameter) or isinstance(operand._base, nn.Parameter):
            return True
        return self._tags.of(operand) is LEARNED

    def _call(self, operands: list[Tensor], result: Tensor, learned: bool) -> Call | None:
        caller = self._observer.owners.caller()
        if caller is None or caller is INSIDE_GRAPH:
            return None
        lengths = result.size(-2), result.size(-1)
        cross = learned or (not under_transform() and is_cross(operands[0], operands[1], *lengths))
        return Call(caller, cross)

    # ---- the softmax between them

    def _after_softmax(
        self, func: Function, x: Tensor, scores: Scores, args: Args, kwargs: Kwargs, weights: Any
    ) -> None:
        """Weights, or exponentials that may become weights of the last dimension."""
        dim = -1 if func in fn.EXPONENTIALS else (args[1] if len(args) > 1 else kwargs.get("dim"))
        role = next((role for role in scores.roles if role[1] == fn.from_the_end(dim, x.dim())), None)
        if role is None:
            return
        reason = "torch.func transforms" if under_transform() else unusual(x)
        if kwargs.get("out") is not None:
            reason = "a softmax that writes into `out`"
        if reason is not None:
            self._observer.uncovered.add(reason)
            return
        pending = self._pending(plain(x), scores, *role)
        tag: Any = Exponentials(pending) if func in fn.EXPONENTIALS else Weights(pending, role[1])
        self._tags.put(weights, LogWeights(tag) if func in fn.LOG_SOFTMAXES else tag)

    def _pending(self, logits: Tensor, scores: Scores, queries: int, keys: int) -> Pending:
        if (queries, keys) == (-2, -1):
            return Pending(scores.call, self._read(logits, scores))
        path = (*scores.call.caller.path, ("", "softmax over dimension", keys))  # not the site of the usual one
        call = replace(scores.call, caller=scores.call.caller._replace(path=path))
        return Pending(call, self._read(logits.movedim((queries, keys), (-2, -1)), Scores(call)))

    def _read(self, logits: Tensor, scores: Scores) -> Reading:
        heads, columns = scores.call.caller.heads, scores.columns
        same_rows = [s for s in scores.shifts if s.shape[:-1] == logits.shape[:-1]]
        shift = by_head(torch.stack(same_rows).sum(0), heads) if same_rows else None
        logits = by_head(logits, heads)
        given = logits[..., :columns]
        batch, _, queries, keys = given.shape
        padding = self._observer.padding(scores.call, given, queries, keys, batch)
        sinks = None if columns is None else logits[..., columns:]
        return self._observer.read(scores.call, source_of(given, padding, shift, sinks))

    # ---- what happens to logits and weights on the way

    def _concerns(self, args: Args, kwargs: Kwargs) -> bool:
        return (bool(args) and type(args[0]) is nn.Parameter) or self._has_tagged(args, kwargs)

    def _has_tagged(self, args: Args, kwargs: Kwargs) -> bool:
        return bool(self._tags) and next(self._tags.among((*args, *kwargs.values())), None) is not None

    def _after_carrier(self, func: Function, args: Args, kwargs: Kwargs, result: Any) -> None:
        tagged = [pair for pair in self._tags.among((*args, *kwargs.values())) if isinstance(pair[1], _KINDS)]
        followed = min(tagged, key=lambda pair: _priority(pair[1]), default=None)
        if followed is None:
            self._after_learned(args, result)
            return
        parts = result if func in fn.PARTS and isinstance(result, tuple | list) else (result,)
        for part in parts:
            if isinstance(part, Tensor):
                tag = self._carried(func, args, kwargs, *followed, part)
                if tag is not None:
                    self._tags.put(part, tag)

    def _after_learned(self, args: Args, result: Any) -> None:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if isinstance(result, Tensor) and tensors and all(self._is_learned(tensor) for tensor in tensors):
            self._tags.put(result, LEARNED)

    def _carried(self, func: Function, args: Args, kwargs: Kwargs, tensor: Tensor, tag: Any, part: Tensor) -> Any:
        """The tag of a tensor that was made from a tagged one; None where it is not logits or weights any more."""
        if isinstance(tag, Weights):
            axis = fn.moved(func, args, kwargs, tensor, part, tag.axis)
            return None if axis is None else Weights(tag.pending, axis)
        if isinstance(tag, Total):
            return tag if part.numel() == tensor.numel() else None
        if isinstance(tag, Exponentials):
            return self._carried_exponentials(func, args, kwargs, tag, part)
        if part.dim() < 2:
            return None
        if func in fn.CONCATENATIONS:
            return self._concatenated(tag, args, kwargs, tensor, part)
        if func in fn.SUMS:
            return None
        if func in fn.PERMUTATIONS:
            return _permuted_scores(func, args, kwargs, tensor, tag)
        if part.size(-1) != tensor.size(-1):
            return Scores(tag.call, tag.roles) if func in fn.INDEXING and part.dim() == tensor.dim() else None
        if part.dim() != tensor.dim() and any(axis < -2 for role in tag.roles for axis in role):
            return None
        if func in fn.RESCALINGS:
            return replace(tag, shifts=())
        if func in fn.DIFFERENCES and args and args[0] is tensor:
            return replace(tag, shifts=(*tag.shifts, *_row_shift(tensor, args[1:])))
        return tag

    def _carried_exponentials(self, func: Function, args: Args, kwargs: Kwargs, tag: Exponentials, part: Tensor) -> Any:
        """A softmax that is written out: exponentials, divided by their sum before or after they multiply values."""
        before, sums = args[0] if args else None, self._tags.of(args[1]) if len(args) > 1 else None
        if func in fn.DIVISIONS and isinstance(sums, Total) and sums.pending is tag.pending:
            if tag.multiplied:
                self._commit(tag.pending)
            return None if tag.multiplied else Weights(tag.pending)
        if func in fn.SUMS:
            return None if tag.multiplied or not fn.is_over_last(args, kwargs) else Total(tag.pending)
        if not isinstance(before, Tensor) or part.shape != before.shape:
            return None
        if func not in fn.VALUE_KEEPING and not tag.multiplied:
            tag.pending.reading, tag.pending.reason = None, _CHANGED
        return tag

    def _concatenated(self, tag: Scores, args: Args, kwargs: Kwargs, tensor: Tensor, joined: Tensor) -> Scores | None:
        """Logits with more columns: one more, which is not a logit of a key, is a sink's."""
        tensors = args[0] if args else kwargs.get("tensors", ())
        if joined.size(-1) == tensor.size(-1):
            return tag
        is_sink = len(tensors) == 2 and tensors[0] is tensor and joined.size(-1) == tensor.size(-1) + 1
        is_sink = is_sink and not isinstance(self._tags.of(tensors[1]), Scores)
        return Scores(tag.call, tag.roles, tensor.size(-1) if is_sink else None)


def _priority(tag: Any) -> tuple[int, bool]:
    """Scores of queries and keys come before those of parameters, such as relative positions, that are added."""
    kind = next(i for i, kind in enumerate(_KINDS) if isinstance(tag, kind))
    return kind, isinstance(tag, Scores) and len(tag.roles) < len(EITHER)


def _is_layer(args: Args) -> bool:
    """An activation times a parameter; an einsum tells more."""
    return len(args) > 1 and type(args[1]) is nn.Parameter and not isinstance(args[0], str)


def _permuted_scores(func: Function, args: Args, kwargs: Kwargs, before: Tensor, tag: Scores) -> Scores:
    where = {axis: fn.permuted(func, args, kwargs, before, axis) for role in tag.roles for axis in role}
    return Scores(tag.call, tuple((where[queries], where[keys]) for queries, keys in tag.roles))


def _row_shift(tensor: Tensor, subtracted: Iterable[Any]) -> Iterable[Tensor]:
    for value in subtracted:
        if isinstance(value, Tensor) and value.shape == (*tensor.shape[:-1], 1) and tensor.size(-1) > 1:
            yield plain(value)
