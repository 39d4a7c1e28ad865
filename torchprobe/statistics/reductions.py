"""How the rows of two parts become that of both, for statistics that are plain numbers.

Rows have shape (..., fields). Those of "mean" have one column more, last: the number of elements of each part, so that
the mean of parts of unequal size is that of all their elements. NaN in a part is NaN in the whole, but for "last".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Reduce: TypeAlias = Literal["sum", "mean", "max", "last"]


def weighted_mean(a: Tensor, b: Tensor) -> Tensor:
    """The means of both parts' elements, and how many these are; a part without an element counts for nothing."""
    weight_a, weight_b = a[..., -1:], b[..., -1:]
    total = weight_a + weight_b
    mean = a[..., :-1] * (weight_a / total) + b[..., :-1] * (weight_b / total)
    mean = torch.where(weight_a == 0, b[..., :-1], torch.where(weight_b == 0, a[..., :-1], mean))
    return torch.cat((mean, total), dim=-1)


def last(a: Tensor, b: Tensor) -> Tensor:
    """The later part: the later micro-batch, and of several ranks the highest one."""
    return b


REDUCTIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "mean": weighted_mean,
    "max": torch.maximum,
    "last": last,
}
