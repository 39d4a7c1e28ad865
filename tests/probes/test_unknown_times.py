"""What is not known of a step's times is not written."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchprobe
from tests.probes.timed import Derived, Run, optimizer_of
from tests.setups.compiled import COMPILERS_WARNINGS
from torchprobe.capture import times
from torchprobe.testing import MemoryWriter


def dropped(run):
    run.model(run.data())


def raises(run):
    with pytest.raises(RuntimeError):
        run.model(torch.randn(8, 5))


def unused(run):
    run.model(run.data()).sum().backward()
    run.optimizer.zero_grad()


@pytest.mark.parametrize("extra", [dropped, raises, unused])
def test_a_step_with_a_pass_that_nobody_used(run, extra):
    for _ in range(5):
        extra(run)
        run.steps(1)
    run.session.detach()
    assert not run.seconds("forward")
    assert not run.seconds("backward")
    assert not run.rates("examples")
    assert run.seconds("optimizer") == dict.fromkeys([1, 2, 4, 5], 4.0)


def test_training_in_evaluation_mode(run):
    run.model.eval()
    run.steps(5)
    run.session.detach()
    assert not run.seconds("forward")
    assert not run.seconds("input_wait")
    assert run.seconds("step") == dict.fromkeys(range(2, 6), 14.0)


def test_a_closure_runs_inside_of_the_step(run):
    def closure():
        run.optimizer.zero_grad()
        loss = run.model(torch.randn(8, 4)).square().mean()
        loss.backward()
        return loss

    for _ in range(5):
        run.clock.spend(5.0)
        run.optimizer.step(closure)
    run.session.detach()
    assert not run.seconds("optimizer")
    assert run.seconds("step") == dict.fromkeys(range(2, 6), 14.0)


def test_an_optimizer_that_calls_its_parents_step(run):
    run.optimizer = Derived(run.model.parameters(), lr=1e-3)
    run.optimizer.clock = run.clock
    run.steps(5)
    run.session.detach()
    assert run.seconds("optimizer") in ({}, dict.fromkeys([1, 2, 4, 5], 4.0))  # torch calls its hooks for both
    assert run.seconds("step") == dict.fromkeys(range(2, 6), 14.0)


def test_a_graph_that_is_run_backward_twice(run):
    for _ in range(5):
        loss = run.model(run.data()).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    run.session.detach()
    assert not run.seconds("forward")
    assert not run.seconds("backward")


def test_without_the_probe_nothing_is_written(clock):
    run = Run(clock, probes=[torchprobe.Loss()])
    run.steps(5)
    run.session.detach()
    assert not [tag for tag in run.writer.tags() if tag.startswith("performance/")]


def test_a_probe_that_fails_ends_alone(run, monkeypatch, caplog):
    run.steps(3)
    monkeypatch.setattr(times.Timing, "begin", lambda self, name: 1 / 0)  # of step 4, the next that is timed
    run.steps(9)
    run.session.detach()
    assert caplog.text.count("probe Performance failed") == 1
    assert run.seconds("step") == {2: 14.0, 3: 14.0}
    assert run.seconds("forward") == {1: 2.0, 2: 2.0}
    assert [step for step, _ in run.writer.scalars("overview/loss")] == list(range(1, 13))


@pytest.mark.parametrize("first", [pytest.param(one, marks=COMPILERS_WARNINGS) for one in ("compile", "instrument")])
def test_a_compiled_model_is_as_any_other_or_says_nothing(clock, first):
    model, writer = nn.Linear(4, 1), MemoryWriter()
    optimizer = optimizer_of(model.parameters(), clock)
    callee = torch.compile(model, backend="eager") if first == "compile" else model
    session = torchprobe.instrument(callee, writer=writer)
    callee = torch.compile(model, backend="eager") if first == "instrument" else callee
    for _ in range(10):
        clock.spend(5.0)
        callee(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    session.detach()
    assert {value for _, value in writer.scalars("performance/step_seconds")} == {9.0}
    assert [step for step, _ in writer.scalars("performance/step_seconds")] == list(range(2, 11))
    assert {value for _, value in writer.scalars("performance/input_wait_seconds")} <= {5.0}
    assert {value for _, value in writer.scalars("performance/forward_seconds")} <= {0.0}
    assert [value for _, value in writer.scalars("performance/optimizer_seconds")] == [4.0] * 6
    assert [step for step, _ in writer.scalars("performance/optimizer_seconds")] == [1, 2, 4, 5, 9, 10]
    assert {round(9 * value) for _, value in writer.scalars("performance/examples_per_second")} <= {8}
