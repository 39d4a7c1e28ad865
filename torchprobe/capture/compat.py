"""The one door to what torch does not promise: its private names, and the frames of its functions.

A name is looked up once, when what needs it is used. One that is gone costs what `NAMES` says, and one line in the log;
where there is a second way, it costs nothing. Names of Dynamo are looked up only after something else loaded it, and
of theirs only a model with compiled parts hears.
"""

from __future__ import annotations

import functools
import logging
import pkgutil
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

_log = logging.getLogger("torchprobe")

_EVAL_FRAME = "torch._C:_dynamo.eval_frame."
_GUARDS = "compiled graphs are not guarded: one that was made for an equal model may serve the watched one, unseen"
_RETRACE = "a model that was compiled before torchprobe watched it is not recorded inside its graphs"

NAMES: Mapping[str, str] = {
    "torch._C:_current_graph_task_id": "",  # the callers' frames tell, but on CUDA, where backward has a thread
    "torch.distributed.pipelining:PipelineStage._shape_inference": "",  # each torch has this or the next one
    "torch.distributed.pipelining:PipelineStage._forward_metadata_inference": "",
    "torch.distributed.pipelining.stage:_PipelineStageBase": "pipeline stages of the same names are not told apart",
    "torch.distributed.pipelining.stage:stage_backward": "overview/loss of a pipeline is not written",
    "torch.distributed.pipelining.schedules:_PipelineSchedule": "",  # then a loss is that of all micro-batches
    "torch.autograd:Variable._execution_engine.queue_callback": "",  # the caller is told; no norm before clipping
    "torch._dynamo:compiled_autograd": "",  # then it is not told from the plain one
    "torch.optim.optimizer:_global_optimizer_pre_hooks": "",  # the caller is told
    "torch.optim.optimizer:_global_optimizer_post_hooks": "",  # the caller is told
    "torch._C:DisableTorchFunction": "",  # there is one for subclasses alone
    "torch._C:DisableTorchFunctionSubclass": "function modes and tensor subclasses of the user's see statistics",
    "torch._C:_set_grad_enabled": "",  # there is torch.set_grad_enabled
    "torch._C:_len_torch_dispatch_stack": "",  # then modes are always taken off
    "torch.utils._python_dispatch:_disable_current_modes": "dispatch modes of the user's see statistics",
    "torch._C:_get_tracing_state": "",  # there is torch.jit.is_tracing
    "torch._C:_functorch.peek_interpreter_stack": "torch.func transforms are not told from plain passes",
    "torch._C:_autograd.SavedTensor.data": "the origin of NaN is not looked for in the backward pass",
    "torch.overrides:_push_mode": "",  # each of these has a second way
    "torch.overrides:_pop_mode": "",
    "torch.overrides:_get_current_function_mode_stack": "",
    "torch._C:_push_on_torch_function_stack": "",
    "torch._C:_pop_torch_function_stack": "",
    "torch._C:_get_function_stack_at": "",
    "torch._C:_len_torch_function_stack": "",
    "torch.overrides:_enable_torch_function": "flex_attention with tensors in its score_mod is not read in eager code",
    "torch._dynamo._trace_wrapped_higher_order_op:TransformGetItemToIndex": (
        "flex_attention with tensors in its score_mod is not read in eager code"
    ),
    "torch.utils._device:DeviceContext": "",  # a default device then counts as a mode of the user's
    "torch._higher_order_ops.flex_attention:flex_attention": "",  # then one in a compiled function is not said
    "torch._ops:HigherOrderOperator": "flex_attention is not seen in eager code",
    _EVAL_FRAME + "set_eval_frame": "",  # there is torch.compiler.disable
    _EVAL_FRAME + "set_code_exec_strategy": "",  # each torch has these three or the next one
    _EVAL_FRAME + "_FrameExecStrategy": "",
    _EVAL_FRAME + "_FrameAction": "",
    _EVAL_FRAME + "skip_code": "",
    _EVAL_FRAME + "_debug_get_cache_entry_list": _RETRACE,
    _EVAL_FRAME + "reset_code": _RETRACE,
    "torch._dynamo.convert_frame:input_codes": _RETRACE,
    "torch._dynamo.external_utils:wrap_inline": "a module of torch's own that was compiled before is not compiled anew",
    "torch._dynamo.convert_frame:register_bytecode_hook": _GUARDS,
    "torch._dynamo.guards:GuardBuilder.NOT_PRESENT_IN_GENERIC_DICT": _GUARDS,
    "torch._dynamo.eval_frame:OptimizedModule": "",  # its name tells
    "torch._dynamo.symbolic_convert:InstructionTranslator.current_tx": "nothing is recorded inside compiled graphs",
    "torch._dynamo.utils:_disable_side_effect_safety_checks_for_current_subtracer": (
        "activation checkpoints inside compiled graphs are not recorded"
    ),
    "torch._guards:TracingContext.extract_stack": "several attentions of one module are merged in compiled graphs",
}
"""Where each name stands, `module:name`, and what is lost when it is gone; nothing, where it is empty."""

REPLICA = "_is_replica"
"""Key in the `__dict__` of a copy of a model that DataParallel makes, with our hooks, and runs in another thread."""


@functools.cache
def lost(what: str) -> None:
    """Say once that something is off, since this torch lacks a private name."""
    _log.warning("%s (torch %s has changed in its inside); training goes on", what, torch.__version__)


@functools.cache
def find(name: str) -> Any:
    """What stands under one of `NAMES`; None when it is gone, which is said once where something is lost by it."""
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        if NAMES[name] and "_dynamo" not in name:
            lost(NAMES[name])
        return None


@functools.cache
def say_what_graphs_lose() -> None:
    """Something of the model is compiled: say what is off without names of Dynamo. An eager model hears nothing."""
    for name, what in NAMES.items():
        if what and "_dynamo" in name and find(name) is None:
            lost(what)
    if not _skips():
        lost("hooks of torchprobe are compiled too, where they run beside a compiled module")


# ---- frames of the callers


def running(
    code: CodeType, frame: FrameType | None = None, not_from: CodeType | None = None
) -> list[Mapping[str, Any]]:
    """Local variables of each caller that runs this code, innermost first.

    frame: where to start; by default the caller. not_from: code whose own calls do not count. Costs 0.1 µs a frame.
    """
    at: FrameType | None = frame or sys._getframe(1)
    found: list[Mapping[str, Any]] = []
    while at is not None:
        if at.f_code is code and (not_from is None or at.f_back is None or at.f_back.f_code is not not_from):
            found.append(at.f_locals)
        at = at.f_back
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


def no_torch_function() -> AbstractContextManager[Any]:
    """Within, no function mode and no tensor subclass of anybody's sees a call."""
    made = find("torch._C:DisableTorchFunction") or find("torch._C:DisableTorchFunctionSubclass") or nullcontext
    return made()


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
    for function in functions:
        _skip(function.__code__)


def _skip(code: CodeType) -> None:
    older = find(_EVAL_FRAME + "skip_code")
    if older is not None:
        older(code)
    elif _skips():
        skip, strategy, action = (find(_EVAL_FRAME + name) for name in _NEWER)
        skip(code, strategy(action.SKIP, action.DEFAULT))


def _skips() -> bool:
    newer = all(find(_EVAL_FRAME + name) is not None for name in _NEWER)
    return newer or find(_EVAL_FRAME + "skip_code") is not None


_NEWER = ("set_code_exec_strategy", "_FrameExecStrategy", "_FrameAction")  # in place of what torch 2.6 has


def shape_of_result(node: Any, number: int = 0) -> tuple[int, ...] | None:
    """The shape of what a node of a graph gave; None where torch does not say."""
    known = getattr(node, "_input_metadata", ())
    return tuple(known[number].shape) if number < len(known) else None


def sequence_number(node: Any) -> int | None:
    """When a node of a graph was made: a later one has a higher number. None without it: no loss is then read of a
    graph.
    """
    number = getattr(node, "_sequence_nr", None)
    return None if number is None else int(number())
