"""Torch's private names that are used, what is lost without each, and looking one up.

A name is looked up once, when what needs it is used. One that is gone costs what `NAMES` says, and one line in the log;
where there is a second way, it costs nothing.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Mapping
from typing import Any

import torch

from torchprobe.messages import log as _log

EVAL_FRAME = "torch._C:_dynamo.eval_frame."
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
    "torch._dynamo:config": "",  # as the next one
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
    EVAL_FRAME + "set_eval_frame": "",  # there is torch.compiler.disable
    EVAL_FRAME + "set_code_exec_strategy": "",  # each torch has these three or the next one
    EVAL_FRAME + "_FrameExecStrategy": "",
    EVAL_FRAME + "_FrameAction": "",
    EVAL_FRAME + "skip_code": "",
    EVAL_FRAME + "_debug_get_cache_entry_list": _RETRACE,
    EVAL_FRAME + "reset_code": _RETRACE,
    "torch._dynamo.convert_frame:input_codes": _RETRACE,
    "torch._dynamo.external_utils:wrap_inline": "a module of torch's own that was compiled before is not compiled anew",
    "torch._dynamo.convert_frame:register_bytecode_hook": f"{_GUARDS}; attention written out in one is not named",
    "torch._dynamo.guards:GuardBuilder.NOT_PRESENT_IN_GENERIC_DICT": _GUARDS,
    "torch._dynamo.eval_frame:OptimizedModule": "",  # its name tells
    "torch._C:_current_autograd_node": "",  # then a graph that is called twice for one backward pass may fail
    "torch.autograd:_unsafe_preserve_version_counter": "",  # as the one before
    "torch._dynamo:mark_static_address": "",  # then sampled steps have a graph of their own
    "torch._dynamo.symbolic_convert:InstructionTranslator.current_tx": "nothing is recorded inside compiled graphs",
    "torch._dynamo.utils:_disable_side_effect_safety_checks_for_current_subtracer": (
        "activation checkpoints inside compiled graphs are not recorded"
    ),
}
"""Where each name stands, `module:name`, and what is lost when it is gone; nothing, where it is empty."""


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
