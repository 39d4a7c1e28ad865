"""Sums over each of many tensors at once: all gradients or all parameters of a model.

Small tensors are packed together and large ones cut up, so that the cost is that of the elements, not of the number
of tensors. Every tensor is copied once into float64, and all arithmetic stays in that scratch memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from torchprobe.statistics.dtypes import CPU_PIECE, DEVICE_PIECE, pieces, real, row_dtype

FIELDS = ("sum_squares", "sum_abs", "nonfinite", "count")
"""Columns of `finite_sums`. The sums and count are over the finite elements."""
