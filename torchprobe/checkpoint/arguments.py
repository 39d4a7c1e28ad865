"""Checks of what a user passes to `CheckpointManager`: each error names the argument, what it got and what it takes."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from torchprobe.session import Session


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


def check_helper(argument: str, helper: Any) -> None:
    """Raise TypeError unless it has a state, or is a list or dict of such."""
    several = helper.values() if isinstance(helper, Mapping) else helper if isinstance(helper, list | tuple) else None
    if several is not None:
        for one in several:
            check_helper(argument, one)
    elif helper is not None and not (hasattr(helper, "state_dict") and hasattr(helper, "load_state_dict")):
        raise TypeError(f"{argument}={helper!r}: takes an object with state_dict() and load_state_dict(), or None")


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.dtype.is_complex
    if isinstance(value, np.ndarray):
        return value.size == 1 and value.dtype.kind in "fiub"
    return isinstance(value, Real | np.bool_)
