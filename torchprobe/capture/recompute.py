"""Tells a first forward pass from one that activation checkpointing runs again."""

from __future__ import annotations

import torch


def backward_id() -> int | None:
    """The number of the backward pass that runs on this thread, or None."""
    current = getattr(torch._C, "_current_graph_task_id", None)  # private; without it, none is ever seen
    return None if current is None or current() == -1 else current()


def in_backward() -> bool:
    """Whether the autograd engine is running on this thread: a forward pass here is a recomputation."""
    return backward_id() is not None


def under_transform() -> bool:
    """Whether values are not plain tensors of this step: `torch.func` transforms, tracing, export."""
    if torch._C._get_tracing_state() is not None:
        return True
    peek = getattr(torch._C._functorch, "peek_interpreter_stack", None)
    return peek is not None and peek() is not None
