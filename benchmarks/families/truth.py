"""What is true of a model's attention: its softmaxes, seen by a mode below autograd that knows nothing of torchprobe.

A softmax counts where its input comes from a product of two activations, element by element, and a product with
another activation sums its result over the keys. `F.scaled_dot_product_attention` is seen as the steps it stands for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

HIDDEN = -5000.0
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
BARRIERS = ("native_layer_norm", "native_group_norm", "native_batch_norm", "sum", "mean", "embedding", "linear")
STATISTICS = ("entropy", "entropy_normalized", "max_prob", "max_logit", "sink", "distance")

Key = tuple[str, tuple[tuple[str, int], ...]]


@dataclass
class Softmax:
    """One softmax of a pass: where, and its logits with the keys last."""

    key: Key
    logits: Tensor
    used: int = 0  # keys that a product sums over, or several, each over a part
    parts: int = 0


@dataclass
class What:
    """What a storage holds. const: made of parameters; scores: of a product; of: of which softmaxes."""

    const: bool
    scores: bool = False
    of: frozenset[int] = field(default_factory=frozenset)


class Recorder(TorchDispatchMode):
    """Everything that passes is kept, so that no two storages have one address."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.softmaxes: list[Softmax] = []
        self._alive: list[Any] = []
        constants = [*model.parameters(), *model.buffers()]
        self._what = {_address(tensor): What(True) for tensor in constants}
        self._names = {id(module): name for name, module in model.named_modules()}
        self._stack: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = list(_tensors((args, kwargs or {})))
        name = func.overloadpacket.__name__
        for out in _tensors(result):
            if not any(
                _address(out) == _address(one) and name != "copy_" and not name.endswith("_") for one in tensors
            ):
                self._what[_address(out)] = self._made(name, tensors, out, args)
            self._alive.append(out)
        return result

    def _of(self, tensor: Tensor) -> What:
        return self._what.setdefault(_address(tensor), What(False))

    def _made(self, name: str, tensors: list[Tensor], out: Tensor, args: tuple[Any, ...]) -> What:
        whats = [self._of(tensor) for tensor in tensors]
        const = all(what.const for what in whats)
        if name in ("_softmax", "_safe_softmax", "softmax") and whats[0].scores:
            self._seen(tensors[0], args[1])
            return What(False, of=frozenset([len(self.softmaxes) - 1]))
        if name in PRODUCTS:
            return self._product(name, tensors[PRODUCTS[name] :], out)
        same = any(tensor.numel() == out.numel() for tensor, what in zip(tensors, whats, strict=True) if not what.const)
        if name in BARRIERS or (name == "convolution" and not same):
            return What(const)
        of = frozenset(one for what in whats for one in what.of)
        return What(const, any(what.scores for what in whats), of)

    def _product(self, name: str, pair: list[Tensor], out: Tensor) -> What:
        left, right = (self._of(tensor) for tensor in pair[:2])
        if left.const or right.const:
            other, tensor = (right, pair[1]) if left.const else (left, pair[0])
            if name in ("bmm", "baddbmm") and not other.scores and not other.of and not (left.const and right.const):
                return What(False, scores=True)  # parameters that query
            return What(
                left.const and right.const, *((other.scores, other.of) if tensor.numel() == out.numel() else ())
            )
        summed = pair[0].size(-1)
        of = left.of | right.of
        for softmax in (self.softmaxes[one] for one in of):
            keys = softmax.logits.size(-1)
            if summed < keys - 1:
                softmax.parts += summed
            if summed in (keys, keys - 1) or softmax.parts == keys:
                softmax.used = max(summed, softmax.parts)
        return What(False, scores=not of)

    def _seen(self, logits: Tensor, dim: int) -> None:
        self.softmaxes.append(Softmax(self._key(), logits.detach().movedim(dim, -1).double().clone()))

    # ---- where

    def _key(self) -> Key:
        frame, path = sys._getframe(3), []
        while frame is not None and not _is_users_call(frame):
            if "/torch/" not in frame.f_code.co_filename and frame.f_code.co_filename != __file__:
                path.append((frame.f_code.co_filename, frame.f_lineno))
            frame = frame.f_back
        return self._stack[-1] if self._stack else "", tuple(path)

    @contextmanager
    def watching(self) -> Iterator[Recorder]:
        """Within, the mode is on, and it is known which module runs."""

        def enter(module, args):
            self._stack.append(self._names.get(id(module), self._stack[-1] if self._stack else ""))

        def leave(module, args, output):
            self._stack.pop()

        hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
        try:
            with sdpa_kernel(SDPBackend.MATH), self:
                yield self
        finally:
            for hook in hooks:
                hook.remove()

    def sites(self) -> dict[Key, dict[str, float]]:
        """The statistics of each site, of all its calls together."""
        by_site: dict[Key, list[Softmax]] = {}
        for one in self.softmaxes:
            if one.used:
                by_site.setdefault(one.key, []).append(one)
        return {key: _together(calls) for key, calls in by_site.items()}


def _is_users_call(frame: FrameType) -> bool:
    """Whether a module of the user's own is called: a softmax may be a module of torch's."""
    module = frame.f_locals.get("self") if frame.f_code.co_name == "_call_impl" else None
    return module is not None and not type(module).__module__.startswith("torch.")


def _together(calls: list[Softmax]) -> dict[str, float]:
    rows = [_rows(call) for call in calls]
    values = {name: torch.cat([row[name] for row in rows]) for name in rows[0] if all(name in row for row in rows)}
    means = {name: v.nanmean().item() for name, v in values.items() if name != "max_logit"}
    largest = values.get("max_logit", torch.empty(0))
    return means | ({"max_logit": largest.max().item()} if largest.numel() else {})


def _rows(call: Softmax) -> dict[str, Tensor]:
    """Each statistic of each query that sees a key, NaN where it has none."""
    logits = call.logits
    shifted = bool((logits.amax(-1) == 0).all())  # the largest was taken off, so that what it was is not seen
    p = logits.softmax(-1)[..., : call.used]
    logits = logits[..., : call.used]
    seen, count = logits > HIDDEN, (logits > HIDDEN).sum(-1)
    p = p * seen
    entropy = -torch.xlogy(p, p).sum(-1)
    several = torch.where(count > 1, 1.0, torch.nan)
    rows = {
        "entropy": entropy,
        "entropy_normalized": (entropy / count.clamp(min=2).log()).clamp(max=1) * several,
        "max_prob": p.amax(-1),
        "max_logit": logits.masked_fill(~seen, -torch.inf).amax(-1),
        "sink": p.gather(-1, seen.double().argmax(-1, keepdim=True))[..., 0] * several,
    }
    if shifted:
        del rows["max_logit"]
    if p.dim() > 2 and p.size(-1) == p.size(-2):
        index = torch.arange(p.size(-1))
        rows["distance"] = (p * (index - index[:, None]).abs()).sum(-1)
    return {name: values[count > 0] for name, values in rows.items()}


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
