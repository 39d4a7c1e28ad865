"""What a running backward pass was called on, read from the caller's frame, and the gradients that it leaves."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from threading import get_ident
from types import FrameType
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.optim import Optimizer

from torchprobe.capture.compat import running
from torchprobe.capture.pipelining import PIPELINING, backward_code, backward_of_stage, input_backward
from torchprobe.capture.sharding import Named, by_device
from torchprobe.statistics import norms

_BACKWARD = torch.autograd.backward.__code__
_GRAD = torch.autograd.grad.__code__
_SCALED_STEP = torch.amp.GradScaler.step.__code__
_ROUNDING = 1e-6  # of a sum
_RECOMPUTED = torch.utils.checkpoint.CheckpointFunction.backward.__code__  # has a backward pass of its own


class Roots(NamedTuple):
    """What a backward pass begins at.

    call: "backward", "grad" (`autograd.grad`, whose gradients the user puts where he likes), or "" when it was not
    seen. value: the sum of the scalars it was called on, each times the gradient it was given; None when there is
    another tensor among them. for_parameters: whether gradients may reach parameters. again: it makes a graph of them,
    from which a loss may be made (a gradient penalty). inner: of a stage in a pipeline that is not its last: its loss
    is that one's. parts: by which the pipeline's schedule divides gradients at the end.
    """

    call: str
    value: Tensor | None
    for_parameters: bool
    tensors: tuple[Tensor, ...]
    inner: bool = False
    parts: int = 1
    again: bool = False


_UNSEEN = Roots("", None, True, ())


def plain_root() -> Tensor | None:
    """The one number that `backward()` was called on, in this thread and without arguments; None of other calls."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is _BACKWARD:
            call = frame.f_locals
            root, outer = call["tensors"], frame.f_back
            plain = type(root) is tuple and len(root) == 1 and type(root[0]) is Tensor and not call.get("inputs")
            caller = None if outer is None else outer.f_code
            of_stage = PIPELINING in sys.modules and caller is backward_code()
            if not plain or call.get("grad_tensors") is not None or caller is _RECOMPUTED or of_stage:
                return None
            return root[0] if root[0].dim() == 0 and not root[0].is_complex() else None
        if code is _GRAD:
            return None
        frame = frame.f_back
    return None


def roots(thread: int = 0) -> Roots:
    """Of the backward pass that runs on this thread, or that another thread waits for, as on a device.

    thread: that ran the forward pass, where that is known and a device's thread asks. Another one counts only where no
    second one waits, for several models may train at a time. Costs 0.1 µs a frame.
    """
    found = _roots_above(sys._getframe(1))
    if found is not None:
        return found
    frames = sys._current_frames()
    del frames[get_ident()]  # this very frame's: a circle, which would keep the other threads' graphs alive
    found = _roots_above(frames.pop(thread, None))
    if found is not None:
        return found
    others = [other for other in map(_roots_above, frames.values()) if other is not None]
    return others[0] if len(others) == 1 else _UNSEEN


def _roots_above(frame: FrameType | None) -> Roots | None:
    while frame is not None:
        code = frame.f_code
        if code is _BACKWARD and (frame.f_back is None or frame.f_back.f_code is not _RECOMPUTED):
            found = _of_backward(frame.f_locals)  # the outermost counts: those inside are a checkpoint's
            caller = frame.f_back if PIPELINING in sys.modules else None
            if caller is None or caller.f_code is not backward_code():
                return found
            return found._replace(**backward_of_stage(caller)._asdict())
        if code is _GRAD:
            stage = input_backward(frame.f_back) if PIPELINING in sys.modules else None
            return _of_grad(frame.f_locals) if stage is None else _of_inputs(stage)
        frame = frame.f_back
    return None


def _of_inputs(stage: FrameType) -> Roots:
    """Of a stage whose parameters' gradients come later: its loss is known here."""
    outputs, of = _tuple(stage.f_locals["stage_outputs_or_loss"]), backward_of_stage(stage)
    return Roots("grad", None if of.inner else _value(outputs, ()), True, outputs, **of._asdict())


def _of_backward(call: Any) -> Roots:
    tensors, inputs = _tuple(call["tensors"]), call.get("inputs")
    value = _value(tensors, _tuple(call.get("grad_tensors")))
    # Without any they are None, of which older torch makes an empty tuple in place.
    for_parameters = inputs is None or inputs == () or any(isinstance(x, nn.Parameter) for x in _tuple(inputs))
    return Roots("backward", value, for_parameters, tensors)


def in_recomputation() -> int:
    """How many backward passes run that a checkpoint has called inside of another one."""
    return len(running(_RECOMPUTED))


def loss_value(value: Tensor) -> float | Tensor:
    """A number in host memory as such, which waits for nothing; one on a device as a copy, at least 4 bytes wide."""
    if value.is_cpu:
        return float(value.tolist())  # type: ignore[arg-type] # as `on_host`, without its call
    return _wide(value.detach()).clone()


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype.itemsize >= 4 else value.float()


def _of_grad(call: Any) -> Roots:
    mine = any(isinstance(x, nn.Parameter) for x in _tuple(call.get("inputs")))
    return Roots("grad", None, mine, _tuple(call.get("outputs")), again=bool(call.get("create_graph")))


def _tuple(tensors: Any) -> tuple[Any, ...]:
    return (tensors,) if isinstance(tensors, Tensor) or tensors is None else tuple(tensors)


def _value(tensors: tuple[Any, ...], gradients: tuple[Any, ...]) -> Tensor | None:
    total: Tensor | None = None
    for i, root in enumerate(tensors):
        if not isinstance(root, Tensor) or root.numel() != 1 or root.is_complex() or hasattr(root, "full_tensor"):
            return None
        value = _wide(root.detach().reshape(()))
        gradient = gradients[i] if i < len(gradients) else None
        if isinstance(gradient, Tensor):
            value = value * gradient.detach().reshape(())
        total = value if total is None else total + value.to(total.device, total.dtype)
    return total


class ScalerSearch:
    """Which GradScaler skips steps: one that an optimizer's step came from, or, before that, one among all objects.

    That look takes 50 ms, and there are three at most.
    """

    def __init__(self) -> None:
        self.found: ReferenceType[torch.amp.GradScaler] | None = None
        self._left = 3

    def __call__(self) -> bool:
        """Whether an enabled one exists."""
        if self.found is None and self._left:
            self._left -= 1
            scalers = [o for o in gc.get_objects() if issubclass(type(o), torch.amp.GradScaler)]
            self.found = next((ref(scaler) for scaler in scalers if scaler.is_enabled()), None)
        return self.found is not None

    def see_step(self) -> None:
        """A scaled step runs: whose scale it is, unless that is known."""
        if self.found is None:
            self.found = next((ref(call["self"]) for call in running(_SCALED_STEP)), None)

    def scale(self) -> Tensor | None:
        """A copy of its scale, where one was found and has one: this often makes a kernel."""
        scale = self._scale()
        return None if scale is None else scale.clone()

    def backed_off(self, before: Tensor | None, look: bool) -> Tensor | None:
        """Whether its scale has fallen, as after a skipped step; None without one. before: None is its first.

        look: no step has run yet, which would have told of it.
        """
        now = self._scale() if not look or self() else None
        first: float = 0.0 if self.found is None else getattr(self.found(), "_init_scale", 0.0)
        return None if now is None else now < (first if before is None else before)

    def _scale(self) -> Tensor | None:
        scale = None if self.found is None else getattr(self.found(), "_scale", None)
        return scale if isinstance(scale, Tensor) else None


def loss_scale(optimizer: Optimizer) -> Tensor | None:
    """The scale of the GradScaler whose `step` is calling this optimizer, or None."""
    scale = optimizer.__dict__.get("grad_scale")  # a missing attribute would cost 4 µs
    if isinstance(scale, Tensor):
        return scale
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _SCALED_STEP:
        frame = frame.f_back
    scale = None if frame is None else getattr(frame.f_locals["self"], "_scale", None)  # a disabled scaler has none
    return scale if isinstance(scale, Tensor) else None


class LeftGradients:
    """The sums of each gradient as the last backward pass of a sampled step left it, for what changes it afterwards.

    Keeps rows alone, no gradient. Costs a pass over the gradients at each end of a backward pass, and at the beginning
    of one that adds to what another has left.
    """

    def __init__(self) -> None:
        self._rows: dict[str, Tensor] = {}
        self._touched: dict[str, Tensor] = {}  # 1 where a gradient was changed between two backward passes
        self._apart = False
        self._versions: dict[str, tuple[int, int]] = {}

    def forget(self) -> None:
        """Another step begins."""
        self._rows, self._touched, self._versions, self._apart = {}, {}, {}, False

    def come_apart(self) -> None:
        """Gradients of this step are put into place by others, when backward passes have ended."""
        self._apart = True

    def begin(self, gradients: Iterable[Named]) -> None:
        """A backward pass begins, which finds these gradients: zeros, or what another one has left."""
        touched: dict[str, Tensor] = {}
        for names, rows in _sums([named for named in gradients if named.name in self._rows]):
            left = torch.stack([self._rows[name] for name in names])
            before = torch.stack([self._touched.get(name, rows.new_zeros(())) for name in names])
            moved = ((rows - left).abs() > _ROUNDING * left).any(1).to(rows.dtype)
            touched |= zip(names, (torch.maximum(moved, before) * (rows[:, 0] != 0)).unbind(), strict=True)
        self._rows, self._touched = {}, touched

    def end(self, gradients: Sequence[Named]) -> None:
        """It has ended and left these, sums over ranks included."""
        self._versions = {named.name: _version(named) for named in gradients}
        self._rows = {name: row for names, rows in _sums(gradients) for name, row in zip(names, rows, strict=True)}

    def rows(self, used: Sequence[Named], sums: Tensor, scale: Tensor | None, parts: int = 1) -> Tensor:
        """What was left and what of it an optimizer uses, on one device: shape (n, 12), see `probes.gradients`.

        sums: of what is used. scale: what the loss, and so all that was left, was multiplied with. parts: by which a
        pipeline's schedule has divided it since.
        """
        none, zero = sums.new_full((norms.WIDTH,), math.nan), sums.new_zeros(())
        left = torch.stack([self._rows.get(named.name, none).to(sums.device) for named in used])
        if scale is not None or parts > 1:
            by = sums.new_full((), parts)
            by = by if scale is None else by * scale.detach().to(sums.device, sums.dtype).reshape(())
            left = left / torch.stack((by * by, by, torch.ones_like(by), torch.ones_like(by)))
        touched = torch.stack([self._touched.get(named.name, zero).to(sums.device) for named in used])
        touched = torch.full_like(touched, 2) if self._apart else touched
        changes = _column([self._changes(named) for named in used], sums)
        resolution = _column([torch.finfo(named.tensor.dtype).eps for named in used], sums)
        beside = (norms.largest([named.tensor for named in used]), touched, changes, resolution)
        return torch.cat((left, sums, torch.stack(beside, dim=1)), dim=1)

    def gone(self, name: str) -> Tensor | None:
        """The row, shape (12,), of a gradient that was left and is not there any more: nothing is used of it."""
        row = self._rows.get(name)
        return None if row is None else torch.cat((row, row.new_full((norms.WIDTH + 4,), math.nan)))

    def _changes(self, named: Named) -> float:
        """In how many operations it was changed in place since, as far as torch counts them; 1 where replaced."""
        before, now = self._versions.get(named.name, (0, 0)), _version(named)
        return float(now[1] - before[1]) if now[0] == before[0] else 1.0


def _version(named: Named) -> tuple[int, int]:
    gradient = named.parameter.grad
    version = 0 if gradient is None or gradient.is_inference() else gradient._version
    return id(gradient), version if version and not _is_part(named.tensor) else 0


def _is_part(tensor: Tensor) -> bool:
    """Whether it lies in a buffer with others, whose operations count as its own."""
    return tensor.untyped_storage().nbytes() > tensor.numel() * tensor.itemsize


def _sums(gradients: Sequence[Named]) -> Iterator[tuple[list[str], Tensor]]:
    """Names and sums of the gradients of each device."""
    for group in by_device(gradients):
        yield [named.name for named in group], norms.finite_sums([named.tensor for named in group])


def _column(values: Iterable[float], like: Tensor) -> Tensor:
    """Numbers of the host as a tensor: runs of equal ones are filled in, since a copied list would be waited for."""
    return torch.cat([like.new_full((len(list(run)),), value) for value, run in groupby(values)])
