"""Sees at every step whether numbers are still finite, from a few of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from torchprobe.buffer.step import Piece
from torchprobe.capture.autopsy import Finding, of_gradients, of_output
from torchprobe.capture.gate import Gate
from torchprobe.capture.outputs import loss_in, main_tensor
from torchprobe.naming import named_parameters
from torchprobe.records import Text, Value
from torchprobe.statistics.dtypes import on_host, row_dtype

_ELEMENTS = 1024  # of one tensor
_FIRST, _IN_TURN = 4, 4  # parameters looked at in a step: those nearest to the input, and others in turn
_LOOKS = 3  # steps to look at closely before giving up


class Sentinel:
    """Three signs, each a sum over a few elements, at every step: the output, the gradients, the parameters.

    NaN or inf in a forward pass reaches the output, or else the loss and by it all gradients. From a backward pass it
    reaches the gradients of all earlier layers: those of the first parameters are looked at every time, the others in
    turn. What the optimizer breaks is seen in the parameters, or in the next output. An inf in the output alone is no
    sign, since masks are.

    In host memory a sign is seen at once, and explained at once (`autopsy`). Elsewhere it travels with the step's
    values, and the drain thread sets `wants_look`. Either way the next steps are looked at closely: see `looks`.
    """

    def __init__(self, model: ReferenceType[nn.Module], gate: Gate) -> None:
        self.wants_look = False  # set by the drain thread too
        self._model = model
        self._gate = gate
        self._seen: dict[str, Value] = {}
        self._flags: defaultdict[tuple[str, torch.device], list[Tensor]] = defaultdict(list)
        self._explained = False
        self._looks = _LOOKS
        self._turn = 0
        self._elsewhere = False  # parameters outside host memory
        self._parameters: WeakKeyDictionary[Optimizer, list[nn.Parameter]] = WeakKeyDictionary()

    def on_output(self, output: Any) -> None:
        """A training pass has returned."""
        if self._gate.failed:
            return
        with self._gate.boundary(), torch.no_grad():
            tensors = [t for t in (main_tensor(output), loss_in(output)) if t is not None and _is_plain(t)]
            if self._note("output", [_column(t) for t in tensors]):
                self._explain(of_output(self._named(), tensors))

    def on_gradients(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step; one that GradScaler tells to skip looks at them by itself."""
        if self._gate.failed or isinstance(getattr(optimizer, "found_inf", None), Tensor):
            return
        with self._gate.boundary(), torch.no_grad():
            self._turn += 1
            gradients = [p.grad for p in self._some(optimizer) if p.grad is not None]
            if self._note("gradient", [g for g in gradients if type(g) is Tensor and g.layout is torch.strided]):
                self._explain(of_gradients(self._named()))

    def on_parameters(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped. In host memory the next pass tells, and then all of them are looked at."""
        if self._elsewhere and not self._gate.failed:
            with self._gate.boundary(), torch.no_grad():
                self._note("parameter", [p.detach() for p in self._some(optimizer) if not p.is_cpu and _is_plain(p)])

    def take(self) -> tuple[dict[str, Value], list[Piece], bool]:
        """What the step showed: values known already, flags on devices, and whether it is news; starts anew."""
        values, flags = self._seen, self._flags
        if not values:
            self._explained = False
            if not self.wants_look:
                self._looks = _LOOKS
        self._seen, self._flags = {}, defaultdict(list)
        pieces = [
            Piece(self, [f"nonfinite/{sign}"], torch.stack(seen).amax().reshape(1, 1))
            for (sign, _), seen in flags.items()
        ]
        return values, pieces, bool(values) and self._looks > 0

    def looks(self) -> bool:
        """Whether the coming step deserves a close look."""
        wanted, self.wants_look = self.wants_look and self._looks > 0, False
        self._looks -= wanted
        return wanted

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """The signs that a device gave; in the drain thread."""
        for name, seen in zip(names, rows[:, 0].tolist(), strict=True):  # of numpy
            if seen:
                self.wants_look = True
                yield name, 1.0

    def _note(self, sign: str, tensors: Sequence[Tensor]) -> bool:
        """Whether a sign was seen at once."""
        groups: dict[torch.device, list[Tensor]] = {}
        for tensor in tensors:
            few = tensor if tensor.numel() <= _ELEMENTS else _few(tensor)
            groups.setdefault(tensor.device, []).append(few.detach().reshape(-1))
        seen = False
        for device, parts in groups.items():
            total = (parts[0] if len(parts) == 1 else torch.cat(parts)).sum(dtype=row_dtype(device))
            if device.type == "cpu":
                value = on_host(total)
                seen |= math.isnan(value) or (sign != "output" and math.isinf(value))
            else:
                flag = total.isnan() if sign == "output" else total.isfinite().logical_not()
                self._flags[sign, device].append(flag.to(total.dtype))
        if seen:
            self._seen[f"nonfinite/{sign}"] = 1.0
            self.wants_look = True
        return seen

    def _explain(self, finding: Finding | None) -> None:
        """Keeps the first explanation: what follows is its consequence."""
        if finding is not None and not self._explained:
            self._explained = True
            self._seen[f"provenance/{finding.where}"] = Text(finding.text)

    def _some(self, optimizer: Optimizer) -> list[nn.Parameter]:
        known = self._parameters.get(optimizer)
        if known is None:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            known = [p for _, p in self._named() if id(p) in held and p.requires_grad and p.is_floating_point()]
            self._parameters[optimizer] = known
            self._elsewhere |= not all(p.is_cpu for p in known)
        first, rest = known[:_FIRST], known[_FIRST:]
        start = self._turn * _IN_TURN % len(rest) if rest else 0
        return first + rest[start : start + _IN_TURN]

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        model = self._model()
        return [] if model is None else list(named_parameters(model))


def _is_plain(tensor: Tensor) -> bool:
    """Whether the elements are here: no DTensor, fake or sparse tensor."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return plain and tensor.is_floating_point() and tensor.numel() > 0


def _column(x: Tensor) -> Tensor:
    """One element of every row: what is NaN inside a model is NaN along its last dimension soon."""
    return x.detach().select(-1, 0) if x.dim() > 1 and x.shape[-1] > 0 else x.detach()


def _few(x: Tensor) -> Tensor:
    """At most about `_ELEMENTS` of the elements, spread over all dimensions: a view."""
    while x.numel() > _ELEMENTS:
        size, dim = max((size, dim) for dim, size in enumerate(x.shape))
        step = min(size, -(-x.numel() // _ELEMENTS))
        x = x[(slice(None),) * dim + (slice(None, None, step),)]
    return x
