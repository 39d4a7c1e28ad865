"""`nn.MultiheadAttention`: its function, which hides what it does; its projections; and the fused paths in evaluation,
of it and the transformer modules around it, which end as soon as there is a function mode."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, multi_head_attention_forward, pad
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from torchprobe.capture.attention import stack
from torchprobe.capture.attention.layout import blocked
from torchprobe.capture.attention.observer import Uncovered
from torchprobe.capture.compat import is_one_width

FUNCTION = multi_head_attention_forward
PARAMETERS = tuple(inspect.signature(FUNCTION).parameters)


def transparent() -> Callable[..., Any]:
    """The same code, which does not ask: function modes see each step of it."""
    names = {**FUNCTION.__globals__, "has_torch_function": lambda tensors: False}
    copy = FunctionType(FUNCTION.__code__, names, FUNCTION.__name__, FUNCTION.__defaults__, FUNCTION.__closure__)
    copy.__kwdefaults__ = FUNCTION.__kwdefaults__
    return copy


class Projected(NamedTuple):
    """query, key: (batch, heads, length, width of a head); mask: added to the logits, broadcastable to them; padding:
    bool (batch, keys); added: how many keys at the end are no tokens."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    padding: Tensor | None
    added: int


def projected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    *others: Any,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    **further: Any,
) -> Projected:
    """From the arguments of `F.multi_head_attention_forward`, as `nn.MultiheadAttention` hands them over: inputs are
    (length, batch, width), or (length, width). The keys that it adds, which everybody sees, are the last ones."""
    if query.dim() == 2:
        query, key = query.unsqueeze(1), key.unsqueeze(1)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    if in_proj_weight is not None and not use_separate_proj_weight:
        q_proj_weight, k_proj_weight, _ = in_proj_weight.chunk(3)
    q_bias, k_bias = (None, None) if in_proj_bias is None else in_proj_bias.chunk(3)[:2]
    q = _by_head(linear(query.detach(), q_proj_weight, q_bias), num_heads)  # type: ignore[arg-type]
    if static_k is None:
        k = _by_head(linear(key.detach(), k_proj_weight, k_bias), num_heads)  # type: ignore[arg-type]
    else:
        k = static_k.unflatten(0, (-1, num_heads))
    added = [] if bias_k is None else [_by_head(bias_k, num_heads).expand(k.size(0), -1, -1, -1)]
    added += [torch.zeros_like(k[:, :, :1])] if add_zero_attn else []
    mask = _joined(attn_mask, key_padding_mask, num_heads)
    if added:
        k = torch.cat((k, *added), 2)
        mask = None if mask is None else pad(mask, (0, len(added)))
    return Projected(q, k, mask, None if key_padding_mask is None else is_padding(key_padding_mask), len(added))


def is_padding(mask: Tensor) -> Tensor:
    """A `key_padding_mask`, bool or added, as bool (batch, keys): True is padded."""
    padded = mask.detach() if mask.dtype is torch.bool else blocked(mask.detach())
    return padded if padded.dim() == 2 else padded.unsqueeze(0)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(length, batch, width) -> (batch, heads, length, width of a head)."""
    by_head: Tensor = x.unflatten(-1, (heads, x.size(-1) // heads))
    return by_head.permute(1, 2, 0, 3)


def _joined(mask: Tensor | None, padding: Tensor | None, heads: int) -> Tensor | None:
    """Both masks as one that is added: (queries, keys) or (batch · heads, queries, keys), and (batch, keys)."""
    if mask is not None:
        mask = _added(mask)
        mask = mask.unflatten(0, (mask.size(0) // heads, heads)) if mask.dim() == 3 else mask
    if padding is None:
        return mask
    padding = _added(padding)[:, None, None]
    return padding if mask is None else mask + padding


def _added(mask: Tensor) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask.detach()
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(mask, -torch.inf)


# ---- fused paths

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
            self._handles.append(hooked.register_forward_pre_hook(self._before))
            self._handles.append(hooked.register_forward_hook(self._after, always_call=True))
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
