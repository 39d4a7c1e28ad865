"""The fused paths of PyTorch's own transformer modules in evaluation, which end as soon as there is a function mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from torchprobe.capture.attention import stack
from torchprobe.capture.attention.observer import Uncovered
from torchprobe.capture.compat import is_one_width

_FUSED = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


class FastPaths:
    """Takes a mode off the stack before such a module runs in evaluation, and puts it on again after it.

    By hooks that are there during a pass of a model that has such a module in evaluation. `nn.TransformerEncoderLayer`
    leaves its fused path for a hook on it or inside it: one that is in no `nn.TransformerEncoder` costs what the module
    around it computes itself.
    """

    def __init__(self, mode: TorchFunctionMode, uncovered: Uncovered) -> None:
        self._mode = mode
        self._uncovered = uncovered
        self._outermost: nn.Module | None = None  # for which the mode is off
        self._fused: dict[nn.Module, nn.Module] = {}  # what is hooked, and whose fused path it is for
        self._handles: list[RemovableHandle] = []

    def begin_pass(self, model: nn.Module, module: nn.Module, modules: Iterable[nn.Module]) -> None:
        """A pass of a module begins, with the mode on the stack. modules: the model's."""
        self.end_pass()
        if not torch.backends.mha.get_fastpath_enabled() or not any(isinstance(one, _FUSED) for one in modules):
            return
        self._fused = dict(_places(model))
        for hooked in self._fused:
            self._handles += [
                hooked.register_forward_pre_hook(self._before),
                hooked.register_forward_hook(self._after, always_call=True),
            ]
        if module in self._fused:
            self._before(module, ())

    def end_pass(self) -> None:
        """The pass is over."""
        while self._handles:
            self._handles.pop().remove()
        self._fused = {}
        self._outermost = None

    def _before(self, module: nn.Module, args: Any) -> None:
        fused = self._fused.get(module)
        if self._outermost is not None or fused is None or not _may_be_fused(fused, args if fused is module else ()):
            return
        if stack.remove(self._mode):
            self._outermost = module
            self._uncovered.add(f"the fused path of nn.{type(fused).__name__} in evaluation")

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._outermost is module:
            self._outermost = None
            stack.push_mode(self._mode)


def has_any(model: nn.Module) -> bool:
    """Whether a model has a module with a fused path in evaluation."""
    return torch.backends.mha.get_fastpath_enabled() and next(_places(model), None) is not None


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The modules to hook, each with the one whose fused path it is for."""
    waiting: list[tuple[nn.Module, nn.Module]] = [(model, model)]
    while waiting:
        module, around = waiting.pop()
        if _has_fused_path(module):
            yield around if type(module) is nn.TransformerEncoderLayer else module, module
        if not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            runs = not isinstance(module, nn.ModuleList | nn.ModuleDict)
            waiting += [(child, module if runs else around) for child in module.children()]


def _has_fused_path(module: nn.Module) -> bool:
    if module.training or not isinstance(module, _FUSED):
        return False
    attentions = [part for part in module.modules() if isinstance(part, nn.MultiheadAttention)]
    return any(part.batch_first and part.num_heads % 2 == 0 and is_one_width(part) for part in attentions)


def _may_be_fused(module: nn.Module, args: Any) -> bool:
    """PyTorch never chooses the fused path for cross-attention, nor with gradients for all of the parameters."""
    if torch.is_grad_enabled() and all(parameter.requires_grad for parameter in module.parameters()):
        return False
    return not isinstance(module, nn.MultiheadAttention) or len(args) < 3 or args[0] is args[1] is args[2]
