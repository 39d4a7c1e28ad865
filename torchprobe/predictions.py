"""What the user hands in as predictions: checked at the call, never read from the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def checked_predictions(probs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """Predictions and targets as tensors of one device. Raises TypeError and ValueError that name the argument."""
    p, y = _tensor("probs", probs), _tensor("targets", targets)
    if not p.is_floating_point():
        raise TypeError(f"probs: got {p.dtype}, takes floating-point probabilities; class numbers go into targets")
    if y.is_complex():
        raise TypeError(f"targets: got {y.dtype}, takes class numbers")
    fitting = p.shape == y.shape or (p.dim() > 0 and p.shape[:-1] == y.shape)
    if not fitting:
        raise ValueError(
            f"targets: got shape {tuple(y.shape)} for probs of shape {tuple(p.shape)}; takes that without the "
            "last dimension, the classes (probs.movedim(1, -1) puts them there)"
        )
    return p, y.to(p.device, non_blocking=True)


def _tensor(argument: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return torch.from_numpy(np.ascontiguousarray(value))
    raise TypeError(f"{argument}={value!r}: takes a tensor or a numeric numpy array, not {type(value).__name__}")
