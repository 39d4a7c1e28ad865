"""PLACEHOLDER, replaced by the author of this folder."""
import torch
from torchprobe.statistics.dtypes import real
def linear_histogram(x, buckets=64):
    x = real(x).double().reshape(-1); ok = x.isfinite()
    if x.numel() == 0: return torch.zeros(3 + buckets, dtype=torch.float64)
    lo = torch.where(ok, x, torch.inf).amin(); hi = torch.where(ok, x, -torch.inf).amax()
    i = ((x - lo) / (hi - lo).clamp(min=1e-300) * buckets).nan_to_num(0).clamp(0, buckets - 1).long()
    c = torch.zeros(buckets, dtype=torch.float64).scatter_add_(0, i, ok.double())
    return torch.cat([lo.reshape(1), hi.reshape(1), (~ok).sum().double().reshape(1), c])
def edges(low, high, buckets):
    return [low + (high - low) * i / buckets for i in range(buckets + 1)]
