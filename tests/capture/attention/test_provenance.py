"""Whether queries and keys have one source, by their autograd graphs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchprobe.capture.attention.layout import same_source

project_q, project_k = nn.Linear(8, 8), nn.Linear(8, 8)


def sliced_often(x: Tensor) -> Tensor:
    """As rotary positions do, with a slice a dimension in older versions of torch."""
    for _ in range(30):
        x = x[:, 1:]
    return x


def test_slices_bring_no_distance():
    x = torch.randn(2, 40, 8, requires_grad=True).tanh()
    assert same_source(sliced_often(project_q(x)), sliced_often(project_k(x)))


def test_other_sources_stay_apart_behind_slices():
    x, y = (torch.randn(2, 40, 8, requires_grad=True).tanh() for _ in range(2))
    assert same_source(sliced_often(project_q(x)), sliced_often(project_k(y))) is False
