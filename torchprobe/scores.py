"""Arrays of numbers that the user hands in: checked at the call, never read from the device."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchprobe.buffer.step import Piece, Reporter
from torchprobe.statistics import out_of_distribution as separation

_log = logging.getLogger("torchprobe")


def floats(argument: str, value: Any) -> Tensor:
    """A tensor, numpy array or number as real floats, detached. Raises TypeError, naming the argument, for others."""
    if isinstance(value, Tensor):
        if not value.is_complex():
            return value.detach() if value.is_floating_point() else value.detach().float()
    elif isinstance(value, np.ndarray | np.generic | int | float):
        array = np.asarray(value)
        if array.dtype.kind in "fiub":
            return torch.from_numpy(array.astype(np.promote_types(array.dtype, np.float32)))
    raise TypeError(f"{argument}={value!r}: takes a tensor, a numpy array or a number, not {type(value).__name__}")


def separation_piece(reporter: Reporter, in_scores: Any, out_scores: Any, name: str) -> Piece | None:
    """The row of two sets of scores, on the device of the first; None, with a traceback in the log, when that fails.

    Raises TypeError for what is no array of numbers, and for a name that is no string.
    """
    if not isinstance(name, str):
        raise TypeError(f"name={name!r}: takes a string, such as 'ood', not {type(name).__name__}")
    inside, outside = floats("in_scores", in_scores), floats("out_scores", out_scores)
    try:
        rows = separation.compute(inside, outside.to(inside.device, non_blocking=True))[None]
    except Exception:
        _log.exception("log_ood failed and its scores are left out; training goes on")
        return None
    return Piece(reporter, [name], rows)
