"""Rows of one module are merged when the step is gathered, whatever their number."""

from __future__ import annotations

import pytest
import torch
from torchprobe.capture.taps import Memo, Tap

from torchprobe.capture.gate import Gate, Meter
from torchprobe.probes.activations import Activations
from torchprobe.statistics import moments


def tap() -> Tap:
    return Tap(Activations().reporter(), Gate("Activations", Meter()), torch.device("cpu"), Memo())


@pytest.mark.parametrize("calls", [1, 2, 63, 64, 65, 200])
def test_all_calls_are_in_the_row(calls):
    site, parts = tap(), [torch.randn(1 + i % 5) for i in range(calls)]
    for part in parts:
        site.add(part, training=True)
    row = site.take(training=True, compiled=False)
    assert row[-1] == calls
    torch.testing.assert_close(row[:-1], moments.compute(torch.cat(parts)), rtol=1e-5, atol=1e-7)
    assert site.take(training=True, compiled=False)[-1] == 0


def test_training_and_validation_are_apart():
    site = tap()
    site.add(torch.ones(3), training=True)
    site.add(torch.ones(5), training=False)
    assert site.take(training=False, compiled=False)[0] == 5
    assert site.take(training=True, compiled=False)[0] == 3


def test_what_a_compiled_graph_merged_in_place_is_added():
    site = tap()
    site.merge(torch.ones(3), training=True)
    site.add(torch.ones(4), training=True)
    row = site.take(training=True, compiled=True)
    assert (row[0], row[-1]) == (7, 2)


def test_a_tensor_changed_in_place_is_computed_anew():
    site, x = tap(), torch.ones(4)
    site.add(x, training=True)
    site.add(x.add_(2), training=True)
    assert site.take(training=True, compiled=False)[1] == 2
