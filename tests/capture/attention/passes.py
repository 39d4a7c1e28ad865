"""Small modules, and the calls that they make."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

sdpa = F.scaled_dot_product_attention


def depth() -> int:
    return torch._C._len_torch_function_stack()


class Lambda(nn.Module):
    def __init__(self, run) -> None:
        super().__init__()
        self.run = run

    def forward(self, *args):
        return self.run(*args)


def qkv():
    return torch.randn(3, 2, 3, 5, 4).unbind(0)
