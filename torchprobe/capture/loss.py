"""Finds the training loss where it can be seen, without a line in the user's code."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle

from torchprobe.capture.compat import running
from torchprobe.capture.compiled.graphs import in_wrapper_call
from torchprobe.capture.gate import Gate
from torchprobe.capture.outputs import loss_in, tensors_in

_REACH = 64  # autograd nodes between the model's output and a loss, at most


class LossCapture:
    """The loss of a step, mean over its micro-batches: what leads to one backward pass is one.

    In this order, per micro-batch: a `loss` field that the model returns, which is a share of the step's when the model
    was told the number of items in all micro-batches, as HuggingFace's Trainer does; the value of the one loss module
    that ran on its output; what `backward()` was called on, divided by GradScaler's scale, added up over
    micro-batches.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._on_modules: RemovableHandle | None = None
        self._on_parameter: RemovableHandle | None = None
        self._passes = 0  # those that were seen; a compiled model's are not
        self._nodes: list[Any] = []  # autograd nodes of the running micro-batch's outputs
        self._returned: list[Tensor] = []  # losses of the running micro-batch: in the model's output
        self._of_modules: list[Tensor] = []  # and those that loss modules computed
        self._means: list[Tensor] = []
        self._shares: list[Tensor] = []
        self._sums: list[Tensor] = []

    def arm(self, parameter: nn.Parameter | None) -> None:
        """A step to sample begins. `parameter` is one that is trained: backward arrives there too."""
        if parameter is not None:
            self._on_parameter = parameter.register_post_accumulate_grad_hook(self._after_backward)

    def disarm(self) -> None:
        """Take off every hook."""
        if self._on_modules is not None:
            self._stop_watching_modules()
        if self._on_parameter is not None:
            self._on_parameter.remove()
            self._on_parameter = None

    def on_output(self, output: Any, call: Mapping[str, Any]) -> None:
        """A training pass has returned, with or without a loss of its own. call: its keyword arguments."""
        loss = loss_in(output)
        nodes = [t.grad_fn for t in tensors_in(output) if t.grad_fn is not None]
        if loss is None and not nodes:  # reentrant checkpointing: what it returns in its place is not seen
            return
        self._passes += 1
        if loss is not None:
            is_share = call.get("num_items_in_batch") is not None
            (self._shares if is_share else self._returned).append(_snapshot(loss))
        elif self._gate.train:
            self._nodes += nodes
            if self._on_modules is None and not in_wrapper_call():
                # Process-wide, so it is there from the model's output to its backward pass only.
                self._on_modules = register_module_forward_hook(self._after_module)

    def on_backward(self) -> None:
        """Backward runs through the output: when nothing else told, see what it was called on."""
        if self._nodes and not (self._returned or self._shares) and len(self._of_modules) != 1:
            self._add_backward_root()
        self._end_batch()

    def take(self, scale: Tensor | None = None) -> Tensor | None:
        """The step's loss, when one was seen; starts anew. scale: what GradScaler multiplied it with."""
        if self._returned or self._of_modules or self._nodes:
            self._end_batch()
        means, shares, sums = self._means, self._shares, self._sums
        self._passes = 0
        self.drop_batches()
        if means:
            return torch.stack(means).mean()
        if shares:
            return torch.stack(shares).sum()
        if sums:
            return torch.stack(sums).sum() / (1.0 if scale is None else scale)
        return None

    def drop_batches(self) -> None:
        """Forget the micro-batches that had their backward pass; the running one stays."""
        self._means, self._shares, self._sums = [], [], []

    def _end_batch(self) -> None:
        self._means += self._returned or (self._of_modules if len(self._of_modules) == 1 else [])
        self._returned, self._of_modules, self._nodes = [], [], []
        if self._on_modules is not None:
            self._stop_watching_modules()

    def _stop_watching_modules(self) -> None:
        if self._on_modules is not None:
            self._on_modules.remove()
        self._on_modules = None

    def _after_backward(self, parameter: Tensor) -> None:
        if self._gate.train and not self._passes:
            with self._gate.boundary():
                self._add_backward_root()

    def _add_backward_root(self) -> None:
        root = backward_root()
        if root is not None:
            self._sums.append(_snapshot(root))

    def _after_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(module, _Loss) or not self._nodes or torch.compiler.is_compiling():
            return
        with self._gate.boundary():
            if isinstance(output, Tensor) and output.numel() == 1 and descends(output, self._nodes):
                self._of_modules.append(_snapshot(output))


def _snapshot(loss: Tensor) -> Tensor:
    """A copy: the user may change the loss in place."""
    return loss.detach().to(torch.float32, copy=True).reshape(())


def descends(tensor: Tensor, nodes: list[Any]) -> bool:
    """Whether a tensor was computed from one of the autograd nodes, a few operations away."""
    queue, seen = deque([tensor.grad_fn]), 0
    while queue and seen < _REACH:
        node = queue.popleft()
        seen += 1
        if node is None:
            continue
        if any(node is other for other in nodes):
            return True
        queue.extend(following for following, _ in node.next_functions)
    return False


def backward_call() -> Any:
    """What the running `backward()` was called on; None when no parameter gets a gradient (`autograd.grad`).

    On CUDA the engine runs hooks on a thread of its own; the caller waits in another one.
    """
    code = torch.autograd.backward.__code__
    inner = torch.utils.checkpoint.CheckpointFunction.backward.__code__  # reentrant, with a backward pass of its own
    for frame in (sys._getframe(), *sys._current_frames().values()):
        for caller in running(code, frame, not_from=inner):
            return caller["tensors"]
    return None


def backward_root() -> Tensor | None:
    """The scalar on which the running `backward()` was called, if it was one."""
    tensors = backward_call()
    roots = [tensors] if isinstance(tensors, Tensor) else list(tensors or ())
    return roots[0] if len(roots) == 1 and roots[0].numel() == 1 else None


def loss_scale(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """The scale of the GradScaler whose `step` is calling this optimizer, or None."""
    scale = getattr(optimizer, "grad_scale", None)
    if isinstance(scale, Tensor):
        return scale
    for caller in running(torch.amp.GradScaler.step.__code__):
        scale = caller["self"]._scale
        return scale if isinstance(scale, Tensor) else None
    return None
