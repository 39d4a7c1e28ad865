"""Private names of torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import optimizer as _optim


def backward_id() -> int | None:
    """The number of the backward pass that runs on this thread, or None."""
    current = getattr(torch._C, "_current_graph_task_id", None)
    number = None if current is None else current()
    return None if number == -1 else number


def at_end_of_backward(function: Callable[[], None]) -> bool:
    """Have a function called when the running backward pass ends."""
    engine = getattr(torch.autograd.Variable, "_execution_engine", None)
    if engine is None:
        return False
    engine.queue_callback(function)
    return True


def optimizer_pre_hooks() -> OrderedDict[int, Any] | None:
    return getattr(_optim, "_global_optimizer_pre_hooks", None)


def optimizer_post_hooks() -> OrderedDict[int, Any] | None:
    return getattr(_optim, "_global_optimizer_post_hooks", None)


def own_step_hooks(optimizer: torch.optim.Optimizer) -> OrderedDict[int, Any] | None:
    return getattr(optimizer, "_optimizer_step_pre_hooks", None)
