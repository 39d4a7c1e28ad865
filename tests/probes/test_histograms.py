"""The histogram that is shown counts what lies between the edges that are shown."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import torchprobe
from torchprobe.testing import MemoryWriter


@pytest.mark.parametrize("value", [None, 0.25])
def test_a_parameters_elements_lie_between_the_edges_of_their_bucket(value):
    model, writer = nn.Linear(30, 40), MemoryWriter()
    if value is not None:
        nn.init.constant_(model.weight, value)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torchprobe.instrument(model, writer=writer, probes=[torchprobe.Histograms(every=1)]):
        model(torch.ones(2, 30)).sum().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        ((_, histogram),) = writer.histograms(f"parameters/{name}")
        counts, _ = np.histogram(parameter.detach().double().numpy(), histogram.edges)
        assert histogram.counts.tolist() == counts.tolist()
        assert counts.sum() == parameter.numel()
