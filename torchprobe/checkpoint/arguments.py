"""What a user passes to `CheckpointManager`: checked, and judged by.

Each error names the argument, what it got and what it takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor, nn

from torchprobe.checkpoint.states import each_with
from torchprobe.naming import unwrapped
from torchprobe.session import Session

Mode = Literal["min", "max"]


def check_best(metric: str | None, mode: Mode) -> None:
    """Raise for what `CheckpointManager` cannot judge by."""
    if metric is not None and not isinstance(metric, str):
        raise TypeError(f"metric={metric!r}: takes a metric's name, such as 'val_loss', not {type(metric).__name__}")
    if mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r}: takes 'min' (a loss) or 'max' (an accuracy)")
    if metric is None and mode == "max":
        raise ValueError("mode='max' needs metric=, the name of what is to be large")


def chosen_metric(metric: str | None, metrics: Mapping[str, float]) -> str | None:
    """The metric to judge by: the named one, else a validation loss, else any loss; None when there is none.

    Raises ValueError when metrics are given and the named one is not among them.
    """
    if metric is not None:
        if metrics and metric not in metrics:
            raise ValueError(f"metrics have no {metric!r}, by which the best is judged; they have {sorted(metrics)}")
        return metric if metrics else None
    losses = [name for name in metrics if "loss" in name.lower()]
    return next((name for name in losses if "val" in name.lower()), losses[0] if losses else None)


def is_better(value: float, best: float | None, mode: Mode) -> bool:
    """Whether a value beats the best so far; NaN never does, and anything beats NaN."""
    if math.isnan(value):
        return False
    if best is None or math.isnan(best):
        return True
    return value < best if mode == "min" else value > best


def checked_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """Plain numbers by name. Reads tensors. Raises TypeError for what is no number."""
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise TypeError(f"metrics={metrics!r}: takes a mapping of names to numbers, such as {{'val_loss': 0.3}}")
    for name, value in metrics.items():
        if not isinstance(name, str) or not _is_number(value):
            raise TypeError(f"metrics[{name!r}]={value!r}: takes a name and a number")
    return {name: float(value) for name, value in metrics.items()}


def checked_step(step: int | None, session: Session | None) -> int:
    """The step given, or the session's. Raises TypeError or ValueError for what is no number of steps."""
    if step is None and session is not None:
        return session.step
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step={step!r}: takes a whole number of steps; a model with a session needs none")
    if step < 0:
        raise ValueError(f"step={step}: takes a whole number of steps, 0 or more")
    return step


def check_helpers(model: nn.Module, **helpers: Any) -> None:
    """Raise TypeError unless the model is one, and each helper has a state, is a list or dict of such, or is None."""
    unwrapped(model)
    for argument, helper in helpers.items():
        for one, _ in each_with(helper, helper):
            has_state = hasattr(one, "state_dict") and hasattr(one, "load_state_dict")
            if one is not None and (not has_state or (argument != "extras" and isinstance(one, nn.Module))):
                takes = "an object with state_dict() and load_state_dict() that is no model, or None"
                raise TypeError(f"{argument}={one!r}: takes {takes}")


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.dtype.is_complex
    if isinstance(value, np.ndarray):
        return value.size == 1 and value.dtype.kind in "fiub"
    return isinstance(value, Real | np.bool_)
