"""`session.log_ood`: how well a score separates other data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import torchprobe
from tests.modes import NoHostRead
from torchprobe.testing import MemoryWriter


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()


@pytest.fixture
def run():
    writer, model = MemoryWriter(), nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, probes=[]) as session:
        yield session, writer, lambda: one_step(model, optimizer)


def test_auroc_and_histograms_carry_the_step_that_has_just_ended(run):
    session, writer, step = run
    step()
    step()
    inside = torch.tensor([0.1, 0.2, 0.3, 0.4])
    session.log_ood(inside, torch.tensor([0.3, 0.9]))
    step()
    session.log_ood(inside.numpy(), np.array([[0.0, 0.5]]), name="ood/held_out")
    session.flush()
    assert writer.scalars("ood/auroc") == [(2, (2.5 + 4) / 8)]
    assert writer.scalars("ood/held_out/auroc") == [(3, 0.5)]
    assert [(s, h.counts.sum()) for s, h in writer.histograms("ood/in")] == [(2, 4)]
    assert [(s, h.counts.sum()) for s, h in writer.histograms("ood/out")] == [(2, 2)]
    assert "AUROC" in writer.records[-1].descriptions["ood"]


def test_of_two_calls_the_later_counts(run):
    session, writer, step = run
    step()
    session.log_ood(torch.ones(3), torch.zeros(2))
    session.log_ood(torch.ones(3), torch.ones(2) + 1)
    session.flush()
    assert writer.scalars("ood/auroc") == [(1, 1.0)]


def test_scores_that_are_not_finite_are_counted(run):
    session, writer, step = run
    step()
    session.log_ood(torch.tensor([torch.nan, 1.0]), torch.tensor([torch.inf]))
    session.flush()
    assert writer.value("ood/nonfinite_in") == writer.value("ood/nonfinite_out") == 1
    assert "ood/auroc" not in writer.tags()


def test_nothing_is_read_from_the_device(run):
    session, _, step = run
    step()
    with NoHostRead():
        session.log_ood(torch.rand(30), torch.rand(20))


def test_what_fails_inside_is_logged_and_recording_goes_on(run, caplog, monkeypatch):
    from torchprobe.statistics import out_of_distribution as separation

    session, writer, step = run
    step()
    monkeypatch.setattr(separation, "compute", lambda *_: 1 / 0)
    session.log_ood(torch.rand(3), torch.rand(3))
    session.log_metrics({"loss": 1.0})
    session.flush()
    assert "log_ood failed" in caplog.text
    assert writer.scalars("loss") == [(1, 1.0)]


def test_arguments_that_do_not_fit_are_refused(run):
    session, _, _ = run
    with pytest.raises(TypeError, match=r"out_scores=\[1.0\]: takes a tensor, a numpy array or a number"):
        session.log_ood(torch.ones(1), [1.0])
    with pytest.raises(TypeError, match=r"name=3: takes a string, such as 'ood'"):
        session.log_ood(torch.ones(1), torch.ones(1), 3)
