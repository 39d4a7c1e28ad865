"""PLACEHOLDER, replaced by the author of this folder."""
import math
import torch
from torchprobe.statistics.dtypes import real
LOW, HIGH = -100, 27
def log_histogram(x):
    x = real(x).double().reshape(-1); ok = x.isfinite(); e = torch.frexp(x).exponent - 1
    z = (x == 0).sum().double(); idx = (e.long() - LOW).clamp(0, 127)
    c = torch.zeros(128, dtype=torch.float64).scatter_add_(0, idx, (ok & (x != 0)).double())
    return torch.cat([z.reshape(1), (~ok).sum().double().reshape(1), c])
def edges():
    return [e * math.log10(2) for e in range(LOW, HIGH + 2)]
