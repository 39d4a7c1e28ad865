"""Whether a checkpoint is the best so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

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
