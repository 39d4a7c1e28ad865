"""Rows of one module are merged when the step is gathered, whatever their number, and belong to a pass."""

from __future__ import annotations

import pytest
import torch

from torchprobe.capture.gate import Gate, Meter
from torchprobe.capture.in_place import InPlace
from torchprobe.capture.sites import Memo, Tap
from torchprobe.capture.source import TRAINING, VALIDATION, Dropped, Pass, Running
from torchprobe.probes.activations import Activations
from torchprobe.probes.schedule import every
from torchprobe.statistics import moments

KEEPER = "outputs"


def tap() -> Tap:
    reporter = Activations().reporter()
    reporter.begin(Gate("Activations", Meter()), every(1))
    return Tap("layer", reporter, KEEPER, Running(Meter(), InPlace([])), Memo())


def passing(site: Tap, kind: str = TRAINING) -> Pass:
    return Pass(kind, frozenset([site.reporter]), lambda: None, Dropped())


def row(site: Tap, of: Pass) -> tuple[torch.Tensor, int]:
    """The fields, and how many calls they are of."""
    return site.merged(of.take()[KEEPER][site])


@pytest.mark.parametrize("calls", [1, 2, 63, 64, 65, 200])
def test_all_calls_are_in_the_row(calls):
    site, parts = tap(), [torch.randn(1 + i % 5) for i in range(calls)]
    one = passing(site)
    for part in parts:
        site.add(one, part)
    found, of_calls = row(site, one)
    assert of_calls == calls
    torch.testing.assert_close(found, moments.compute(torch.cat(parts)), rtol=1e-5, atol=1e-7)
    assert not one.kept


def test_passes_are_apart():
    site = tap()
    one, other = passing(site), passing(site, VALIDATION)
    site.add(one, torch.ones(3))
    site.add(other, torch.ones(5))
    assert row(site, other)[0][0] == 5
    assert row(site, one)[0][0] == 3


def test_what_a_compiled_graph_has_computed_is_added():
    running = Running(Meter(), InPlace([]))
    reporter = Activations().reporter()
    reporter.begin(Gate("Activations", Meter()), every(1))
    site = Tap("layer", reporter, KEEPER, running, Memo())
    one = passing(site)
    running.enter(one)
    site.record_row(moments.compute(torch.ones(3)), training=True, gradient=False)
    site.add(one, torch.ones(4))
    found, of_calls = row(site, one)
    assert (found[0], of_calls) == (7, 2)


def test_a_tensor_changed_in_place_is_computed_anew():
    site, x = tap(), torch.ones(4)
    one = passing(site)
    site.add(one, x)
    site.add(one, x.add_(2))
    assert row(site, one)[0][1] == 2
