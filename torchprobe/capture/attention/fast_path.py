"""Modules that run a fused path in evaluation, which PyTorch leaves as soon as a function mode is there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

_FUSED = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


class FastPaths:
    """Calls `suspend` before such a module runs in evaluation and `resume` after it.

    A hook on the module itself would end its fused path as well, so the hooks are process-wide, and there only during
    a pass of a model that has such a module in evaluation.
    """

    def __init__(self, suspend: Callable[[str], None], resume: Callable[[], None]) -> None:
        self._suspend = suspend
        self._resume = resume
        self._modules: set[int] = set()
        self._outermost: int | None = None  # the module for which the capture is suspended
        self._thread = 0
        self._handles: list[RemovableHandle] = []

    def arm(self, model: nn.Module) -> None:
        """A pass begins."""
        self.disarm()
        if not torch.backends.mha.get_fastpath_enabled():
            return
        self._modules = {id(module) for module in model.modules() if _has_fused_path(module)}
        if self._modules:
            self._thread = threading.get_ident()
            self._handles = [
                register_module_forward_pre_hook(self._before),
                register_module_forward_hook(self._after, always_call=True),
            ]

    def disarm(self) -> None:
        """The pass is over."""
        while self._handles:
            self._handles.pop().remove()
        self._modules = set()
        self._outermost = None

    def suspended_by(self, module: nn.Module, args: Any, grad_enabled: bool) -> bool:
        """Suspend the capture if the module that is about to run may choose its fused path."""
        if self._outermost is not None or not self._concerns(module) or not _may_be_fused(module, args, grad_enabled):
            return False
        self._outermost = id(module)
        self._suspend(f"the fused path of nn.{type(module).__name__} in evaluation")
        return True

    def _before(self, module: nn.Module, args: Any) -> None:
        self.suspended_by(module, args, torch.is_grad_enabled())

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._outermost == id(module) and self._concerns(module):
            self._outermost = None
            self._resume()

    def _concerns(self, module: nn.Module) -> bool:
        return id(module) in self._modules and threading.get_ident() == self._thread


def _has_fused_path(module: nn.Module) -> bool:
    if module.training or not isinstance(module, _FUSED):
        return False
    attentions = [part for part in module.modules() if isinstance(part, nn.MultiheadAttention)]
    return any(part.batch_first and part._qkv_same_embed_dim and part.num_heads % 2 == 0 for part in attentions)


def _may_be_fused(module: nn.Module, args: Any, grad_enabled: bool) -> bool:
    """PyTorch never chooses the fused path for cross-attention, nor with gradients for all of the parameters."""
    if grad_enabled and all(parameter.requires_grad for parameter in module.parameters()):
        return False
    return not isinstance(module, nn.MultiheadAttention) or len(args) < 3 or args[0] is args[1] is args[2]
