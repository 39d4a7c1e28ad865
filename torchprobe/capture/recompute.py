"""Tells a first forward pass from one that activation checkpointing runs again."""

from __future__ import annotations

import torch
import torch.utils.checkpoint

from torchprobe.capture.frames import running


def backward_id() -> int | None:
    """The number of the backward pass that runs on this thread, or None."""
    current = getattr(torch._C, "_current_graph_task_id", None)  # private; without it, none is ever seen
    return None if current is None or current() == -1 else current()


def in_backward() -> bool:
    """Whether the autograd engine is running on this thread: a forward pass here is a recomputation."""
    return backward_id() is not None


def in_reentrant_checkpoint() -> bool:
    """Whether this is the first pass of a checkpoint that runs it without gradients, and again in backward."""
    return any(True for _ in running(torch.utils.checkpoint.CheckpointFunction.forward.__code__))


def under_transform() -> bool:
    """Whether values are not plain tensors of this step: `torch.func` transforms, tracing, export."""
    return torch._C._get_tracing_state() is not None or under_function_transform()


def under_function_transform() -> bool:
    """Whether a `torch.func` transform, such as `vmap` or `grad`, runs the caller."""
    peek = getattr(torch._C._functorch, "peek_interpreter_stack", None)
    return peek is not None and peek() is not None
