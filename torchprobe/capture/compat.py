"""The one door to what torch does not promise: private names (see `compiled.private_names`), and frames of functions.

Names of Dynamo are looked up only after something else loaded it, and of theirs only a model with compiled parts hears.
"""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import CodeType, FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.optim import Optimizer

from torchprobe.capture.compiled.private_names import EVAL_FRAME, NAMES, lost
from torchprobe.capture.compiled.private_names import find as find

REPLICA = "_is_replica"
"""Key in the `__dict__` of a copy of a model that DataParallel makes, with our hooks, and runs in another thread."""


@functools.cache
def say_what_graphs_lose() -> None:
    """Something of the model is compiled: say what is off without names of Dynamo. An eager model hears nothing."""
    for name, what in NAMES.items():
        if what and "_dynamo" in name and find(name) is None:
            lost(what)
    if not _skips():
        lost("hooks of torchprobe are compiled too, where they run beside a compiled module")


# ---- frames of the callers


def running(code: CodeType) -> list[Mapping[str, Any]]:
    """Local variables of each caller that runs this code, innermost first. Costs 0.1 µs a frame."""
    frame: FrameType | None = sys._getframe(1)
    found: list[Mapping[str, Any]] = []
    while frame is not None:
        if frame.f_code is code:
            found.append(frame.f_locals)
        frame = frame.f_back
    return found


def in_reentrant_checkpoint() -> bool:
    """Whether this is the first pass of a checkpoint that runs it without gradients, and again in backward."""
    return bool(running(torch.utils.checkpoint.CheckpointFunction.forward.__code__))


# ---- the autograd engine


def backward_id() -> int | None:
    """A number of the backward pass that runs on this thread; None outside of one."""
    current = find("torch._C:_current_graph_task_id")
    if current is None:
        return _backward_frame()
    number = current()
    return None if number == -1 else number


def hear_gradient(tensor: Tensor, hook: Any) -> None:
    """`tensor.register_hook(hook)` for a plain tensor that a graph made, at a third of its cost: without a handle."""
    dictionary = getattr(tensor.grad_fn, "_register_hook_dict", None)
    if dictionary is None or tensor._backward_hooks is not None:
        tensor.register_hook(hook)
        return
    tensor._backward_hooks = OrderedDict([(hook, hook)])  # numbers are the keys of others
    dictionary(tensor)


def last_hook(tensor: Tensor) -> Any:
    """The hook of a tensor that runs last; None where there is none."""
    hooks = tensor._backward_hooks
    return next(reversed(hooks.values()), None) if hooks else None


def in_backward() -> bool:
    """Whether the autograd engine is running on this thread: a forward pass here is a recomputation."""
    return plain_state()[0]() != -1


def at_end_of_backward(function: Callable[[], None]) -> bool:
    """Have a function called when the backward pass that is running ends. False where torch cannot.

    Compiled autograd cannot, nor can it trace this: it is to be called in a hook that is `untraced`.
    """
    queue = find("torch.autograd:Variable._execution_engine.queue_callback")
    compiled = find("torch._dynamo:compiled_autograd") if "torch._dynamo.compiled_autograd" in sys.modules else None
    if queue is None or getattr(compiled, "in_compiled_autograd_region", False):  # it takes them and never calls them
        return False
    try:
        queue(function)
    except RuntimeError:  # nothing that the engine knows of is running
        return False
    return True


def _backward_frame() -> int | None:
    codes = (torch.autograd.backward.__code__, torch.autograd.grad.__code__)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    return None if frame is None else id(frame)


# ---- optimizers


def optimizer_pre_hooks() -> OrderedDict[int, Any] | None:
    """The process-wide hooks before each optimizer's step, in their order; None when torch does not show them."""
    return find("torch.optim.optimizer:_global_optimizer_pre_hooks")  # type: ignore[no-any-return]


def optimizer_post_hooks() -> OrderedDict[int, Any] | None:
    """The process-wide hooks after each optimizer's step, in their order; None when torch does not show them."""
    return find("torch.optim.optimizer:_global_optimizer_post_hooks")  # type: ignore[no-any-return]


def own_step_hooks(optimizer: Optimizer) -> OrderedDict[int, Any] | None:
    """The hooks before the step of one optimizer; None when torch does not show them."""
    return getattr(optimizer, "_optimizer_step_pre_hooks", None)


# ---- transforms and modes


def under_transform() -> bool:
    """Whether values are not plain tensors of this step: `torch.func` transforms, tracing, export."""
    tracing = find("torch._C:_get_tracing_state") or torch.jit.is_tracing  # type: ignore[attr-defined] # the second takes twice the time
    return bool(tracing()) or under_function_transform()


@functools.cache
def plain_state() -> tuple[Callable[[], int], Callable[[], Any], Callable[[], Any]]:
    """Functions that tell that a call is plain: -1 outside of backward passes, false of tracing, None of transforms."""
    current = find("torch._C:_current_graph_task_id") or (lambda: _backward_frame() or -1)
    tracing = find("torch._C:_get_tracing_state") or torch.jit.is_tracing  # type: ignore[attr-defined]
    return current, tracing, find("torch._C:_functorch.peek_interpreter_stack") or (lambda: None)


def under_function_transform() -> bool:
    """Whether a `torch.func` transform, such as `vmap` or `grad`, runs the caller."""
    peek = find("torch._C:_functorch.peek_interpreter_stack")
    return peek is not None and peek() is not None


no_torch_function: Callable[[], AbstractContextManager[Any]] = (
    find("torch._C:DisableTorchFunction") or find("torch._C:DisableTorchFunctionSubclass") or nullcontext
)
"""Within, no function mode and no tensor subclass of anybody's sees a call."""


def no_dispatch_modes() -> AbstractContextManager[Any]:
    """Within, no dispatch mode of the user's sees an operation."""
    depth = find("torch._C:_len_torch_dispatch_stack")
    if depth is not None and not depth():
        return nullcontext()
    disable = find("torch.utils._python_dispatch:_disable_current_modes") or nullcontext
    return disable()


def _no_stack(*mode: Any) -> None:
    lost("attention is not seen")


push_mode: Callable[[Any], None] = (
    find("torch.overrides:_push_mode") or find("torch._C:_push_on_torch_function_stack") or _no_stack
)
"""Put a function mode on top of the stack. Dynamo can trace it."""

pop_mode: Callable[[], Any] = (
    find("torch.overrides:_pop_mode") or find("torch._C:_pop_torch_function_stack") or _no_stack
)
"""Take the top of the stack of function modes off, and return it. Dynamo can trace it."""


switch_gradients: Callable[[bool], Any] = find("torch._C:_set_grad_enabled") or torch.set_grad_enabled
"""Switch gradients on or off in this thread."""


def function_modes() -> list[Any]:
    """The stack of function modes, the innermost last."""
    listed = find("torch.overrides:_get_current_function_mode_stack")
    if listed is not None:
        return list(listed())
    depth, at = find("torch._C:_len_torch_function_stack"), find("torch._C:_get_function_stack_at")
    return [] if depth is None or at is None else [at(i) for i in range(depth())]


def count_function_modes() -> int:
    """How many function modes are on the stack."""
    depth = find("torch._C:_len_torch_function_stack")
    return len(function_modes()) if depth is None else depth()


def missing_for_modes() -> str | None:
    """A name without which no function mode can be put on the stack and taken off; None when all is there."""
    ways = (
        ("torch.overrides:_push_mode", "torch._C:_push_on_torch_function_stack"),
        ("torch.overrides:_pop_mode", "torch._C:_pop_torch_function_stack"),
        ("torch.overrides:_get_current_function_mode_stack", "torch._C:_len_torch_function_stack"),
    )
    return next((first for first, second in ways if find(first) is None and find(second) is None), None)


def item_to_index() -> Any:
    """The mode in which a tensor of one element is an index, as `flex_attention` has it; None when it is gone."""
    if find("torch.overrides:_enable_torch_function") is None:
        return None
    return find("torch._dynamo._trace_wrapped_higher_order_op:TransformGetItemToIndex")


class _Nothing:
    """Stands for a class that torch no longer has: nothing is one of it."""


def enable_torch_function() -> AbstractContextManager[Any]:
    """Within, tensor subclasses and function modes see calls again, where torch had switched that off."""
    enable = find("torch.overrides:_enable_torch_function") or nullcontext
    return enable()


OpOverload: type[Any] = type(torch.ops.aten.add.Tensor)
OpOverloadPacket: type[Any] = type(torch.ops.aten.add)
HigherOrderOperator: type[Any] = find("torch._ops:HigherOrderOperator") or _Nothing
DeviceContext: type[Any] = find("torch.utils._device:DeviceContext") or _Nothing


def flex_attention_operator() -> Any:
    """The operator that `flex_attention` calls; a new object where there is none. Importing it takes no Dynamo."""
    return find("torch._higher_order_ops.flex_attention:flex_attention") or object()


def saved_tensors_are_readable() -> bool:
    """Whether what an autograd node has saved can be looked at."""
    return find("torch._C:_autograd.SavedTensor.data") is not None


def is_one_width(attention: nn.MultiheadAttention) -> bool:
    """Whether queries, keys and values of an `nn.MultiheadAttention` are as wide as each other."""
    return bool(getattr(attention, "_qkv_same_embed_dim", True))


MODULE_CALL = nn.Module.__module__
"""Where modules are called, by one function or another."""

GRAPH_CALLERS = frozenset({"torch._functorch._aot_autograd.runtime_wrappers", "torch._functorch.aot_autograd"})
"""Where the operations of a compiled graph are called that runs one by one."""


# ---- Dynamo, without loading it


def skip_frames(*functions: Callable[..., Any]) -> None:
    """Have functions run as they are where Dynamo meets them as frames of their own.

    That is so for hooks beside a compiled module. Where they are part of a larger frame they are traced as ever.
    """
    older = find(EVAL_FRAME + "skip_code")
    skip, strategy, action = (find(EVAL_FRAME + name) for name in _NEWER)
    for function in functions:
        if older is not None:
            older(function.__code__)
        elif _skips():
            skip(function.__code__, strategy(action.SKIP, action.DEFAULT))


def _skips() -> bool:
    newer = all(find(EVAL_FRAME + name) is not None for name in _NEWER)
    return newer or find(EVAL_FRAME + "skip_code") is not None


_NEWER = ("set_code_exec_strategy", "_FrameExecStrategy", "_FrameAction")  # in place of what torch 2.6 has


def shape_of_result(node: Any) -> tuple[int, ...] | None:
    """The shape of what a node of a graph gave; None where torch does not say."""
    known = getattr(node, "_input_metadata", ())
    return tuple(known[0].shape) if known else None


def sequence_number(node: Any) -> int | None:
    """When a node of a graph was made: a later one has a higher number. None without it: no loss is read there then."""
    number = getattr(node, "_sequence_nr", None)
    return None if number is None else int(number())
