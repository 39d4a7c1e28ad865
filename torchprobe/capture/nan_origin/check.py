"""Sees at every step whether numbers are still finite, from a few of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import ReferenceType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from torchprobe.capture.compat import no_dispatch_modes
from torchprobe.capture.gate import Gate
from torchprobe.capture.nan_origin.graph import Finding, of_gradients, of_output
from torchprobe.capture.outputs import main_tensor
from torchprobe.naming import named_parameters, owner_of
from torchprobe.statistics import dtypes
from torchprobe.statistics.dtypes import on_host

_ELEMENTS = 1024  # of one tensor
_FEW_ELEMENTS = 128
_LOOKS = 3  # steps to look at closely before giving up


class Sign(NamedTuple):
    """That numbers were not finite: in "output" or "gradient", and where it came from, when that is known.

    flag: on a device, whether they were; None where it is known that they were.
    """

    of: str
    finding: Finding | None = None
    flag: Tensor | None = None


class Signs:
    """Reports the flags that came from devices: those that are set, which `seen` hears of in the drain thread."""

    def __init__(self, seen: Callable[[], None]) -> None:
        self._seen = seen

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, float]]:
        """Each name is what a sign is of."""
        for of, count in zip(names, rows[:, 0].tolist(), strict=True):  # on the host by now
            if count > 0:
                self._seen()
                yield f"nonfinite/{of}", 1.0


class NanCheck:
    """Two signs at every step, each from at most about a thousand elements of one tensor.

    NaN in a forward pass reaches the output; NaN or inf in a backward pass reaches the gradients of all earlier
    layers, so that those of the first small parameter tell. An inf in the output alone is no sign, since masks are.

    In host memory a sign is seen at once, and explained at once (`graph`). Elsewhere it is a number on the device,
    0 or 1. Once one was seen, the next steps are looked at closely: see `looks`.
    """

    def __init__(self, model: ReferenceType[nn.Module], gate: Gate) -> None:
        self.gate = gate
        self._model = model
        self._first: nn.Parameter | None = None  # no weak reference: torch swaps no tensor that has one
        self.wanted = False
        """Whether NaN was seen, for those who ask at every step."""
        self._looks, self._last = _LOOKS, 0
        with no_dispatch_modes():
            nan = torch.full((1,), math.nan, device="cpu")
            self._nan_differs = not torch.equal(nan, nan)  # some versions of torch compare addresses first

    def output(self, output: Any) -> Sign | None:
        """A training pass has returned: a sign of NaN, on a device whether there is one, or None when all is well."""
        if self.gate.failed:
            return None
        try:
            few = type(output) is Tensor and output.is_cpu and output.numel() <= _ELEMENTS
            dense = few and output.layout is torch.strided and not output.is_nested
            if dense and self._nan_differs and torch.equal(output, output):
                return None
            return self._of_output(output)
        except Exception as error:
            self.gate.fail(error)
            return None

    def gradients(self) -> Sign | None:
        """A backward pass has ended: the same for its gradients."""
        if self.gate.failed:
            return None
        try:
            parameter = self._first
            gradient = None if parameter is None else parameter.grad
            if type(gradient) is Tensor and gradient.is_cpu and gradient.dim() == 1:
                few = gradient.numel() <= _FEW_ELEMENTS
                if few and math.isfinite(sum(gradient.tolist())):  # in host memory, and no operation
                    return None
            return self._of_gradients()
        except Exception as error:
            self.gate.fail(error)
            return None

    def _of_output(self, output: Any) -> Sign | None:
        tensor = main_tensor(output)
        if tensor is None or not _is_plain(tensor):
            return None
        value = _sum(_column(tensor.detach()))
        if isinstance(value, Tensor):
            return Sign("output", flag=value.isnan())
        named = [*named_parameters(self._model())] if math.isnan(value) else None
        return None if named is None else Sign("output", of_output(named, [tensor]))

    def _of_gradients(self) -> Sign | None:
        parameter = self._first_trained()
        gradient = None if parameter is None else parameter.grad
        if gradient is None or not _is_plain(gradient):
            return None
        value = _sum(gradient.detach() if gradient.requires_grad else gradient)
        if isinstance(value, Tensor):
            return Sign("gradient", flag=(value * 0.0).isnan())  # two kernels, where `isfinite` takes four
        return None if math.isfinite(value) else Sign("gradient", of_gradients([*named_parameters(self._model())]))

    def seen(self) -> None:
        """A step used numbers that are not finite; for any thread."""
        self.wanted = True

    def forget(self) -> None:
        """The run is over."""
        self._first = None

    def looks(self, step: int) -> bool:
        """Whether a step deserves a close look, since NaN was seen."""
        self._looks = self._looks - 1 if step <= self._last + 1 else _LOOKS
        self._last, self.wanted = step, False
        return self._looks > 0

    def _first_trained(self) -> nn.Parameter | None:
        parameter = self._first
        if parameter is None or parameter.grad is None:
            named = named_parameters(self._model())
            found = [(n, p) for n, p in named if p.grad is not None and p.is_floating_point()]
            few = [(n, p) for n, p in found if p.numel() <= _ELEMENTS] or found[:1]
            # All of the first module's see NaN from everywhere behind it: the smallest costs least.
            of_first = [p for n, p in few if owner_of(n) == owner_of(few[0][0])]
            parameter = min(of_first, key=nn.Parameter.numel, default=None)
            self._first = parameter
        return parameter


def _is_plain(tensor: Tensor) -> bool:
    """Whether the elements are here: no DTensor, fake or sparse tensor."""
    plain = type(tensor) in dtypes.PLAIN and tensor.layout is torch.strided
    return plain and tensor.is_floating_point() and tensor.numel() > 0


def _column(x: Tensor) -> Tensor:
    """One element of every row: what is NaN inside a model is NaN along its last dimension soon."""
    return x.select(-1, 0) if x.dim() > 1 else x


def _sum(x: Tensor) -> float | Tensor:
    """Of some of the elements; a number where they are in host memory."""
    few = x if x.numel() <= _ELEMENTS else _few(x)
    if not x.is_cpu:
        return few.sum(dtype=torch.float32)
    return on_host(few.sum(dtype=torch.float32 if x.dtype.itemsize < 4 else None))  # halves add up to more than fits


def _few(x: Tensor) -> Tensor:
    """At most about `_ELEMENTS` of the elements, spread over all dimensions: a view."""
    while x.numel() > _ELEMENTS:
        size, dim = max((size, dim) for dim, size in enumerate(x.shape))
        step = min(size, -(-x.numel() // _ELEMENTS))
        x = x[(slice(None),) * dim + (slice(None, None, step),)]
    return x
