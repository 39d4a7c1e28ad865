"""PLACEHOLDER, replaced by the author of this folder."""
import torch
from torch import Tensor
from torchprobe.statistics.dtypes import real
FIELDS = ("sum_squares", "sum_abs", "nonfinite", "count")
def finite_sums(tensors):
    rows = []
    for t in tensors:
        x = real(t).double().reshape(-1); f = x.nan_to_num(0.0, 0.0, 0.0); n = (~x.isfinite()).sum().double()
        rows.append(torch.stack([f.square().sum(), f.abs().sum(), n, x.numel() - n]))
    return torch.stack(rows)
def l2_norms(tensors):
    return finite_sums(tensors)[:, 0].sqrt()
