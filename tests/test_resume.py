"""A run that stops and goes on in another process: one curve, the same training."""

from __future__ import annotations

import io
import math
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import torchprobe
from tests import warm
from tests.loaders import has_rust_loader, python_points, rust_points
from tests.models import inputs, mlp
from torchprobe.testing import MemoryWriter

TRAIN = """
import os, signal, sys, torch, torchprobe
from tests.models import inputs, mlp

directory, first, last, checkpoint_at, kill = sys.argv[1], *map(int, sys.argv[2:])
torch.manual_seed(0)
model = mlp()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
session = torchprobe.instrument(model, log_dir=directory, every=5, flush_every=7)
if first > 1:
    saved = torch.load(directory + "/../saved.pt", weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    session.load_state_dict(saved["session"])
for step in range(first, last + 1):
    loss = model(inputs("mlp", seed=step)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    session.log_metrics({"loss": loss, "step": step}, prefix="train")
    if step % 10 == 0:
        model.eval()
        model(inputs("mlp"))
        model.train()
        session.log_metrics({"step": step}, prefix="val")
    if step == checkpoint_at:
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "session": session.state_dict()}
        torch.save(saved, directory + "/../saved.pt")
if kill:
    assert session.flush()
    os.kill(os.getpid(), signal.SIGKILL)
session.detach()
"""


def run(directory: Path, *arguments: int) -> int:
    command = [*warm.python(), "-c", TRAIN, str(directory), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(command, env=environment, timeout=120).returncode


LOADERS = [
    python_points,
    pytest.param(rust_points, marks=pytest.mark.skipif(not has_rust_loader(), reason="no data server here")),
]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run that was killed at step 30 and went on from its checkpoint of step 20 to step 40."""
    directory = tmp_path_factory.mktemp("resumed") / "run"
    assert run(directory, 1, 30, 20, 1) == -signal.SIGKILL
    before = python_points(directory)
    assert [step for step, _ in before["train/step"]] == list(range(1, 31))
    assert run(directory, 21, 40, 0, 0) == 0
    return directory


@pytest.mark.parametrize("load", LOADERS)
def test_a_resumed_run_is_one_curve_without_doubles_or_orphans(resumed, load):
    points = load(resumed)
    assert points["train/step"] == [(step, step) for step in range(1, 41)]
    assert points["val/step"] == [(step, step) for step in range(10, 41, 10)]
    sampled = [1, *range(5, 41, 5)]
    assert [step for step, _ in points["overview/grad_norm"]] == sampled
    assert [step for step, _ in points["val/activation_rms/3"]] == [10, 20, 30, 40]
    for tag, series in points.items():
        steps = [step for step, _ in series]
        assert steps == sorted(set(steps)), tag


def test_the_new_file_sorts_last_and_the_old_one_is_untouched(resumed):
    old, new = sorted(resumed.glob("*tfevents*"))
    assert old.stat().st_mtime <= new.stat().st_mtime


def train(model, optimizer, steps, session=None):
    for _ in range(steps):
        model(inputs("mlp")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if session is not None:
            session.log_metrics({"seen": session.step})


def stopped_at(steps, **options):
    """The state of a session after so many steps, having gone through a file."""
    model = mlp()
    with torchprobe.instrument(model, writer=MemoryWriter(), **options) as session:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps)
        file = io.BytesIO()
        torch.save(session.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture
def resume():
    """A session that goes on from a state, its model, its writer."""
    sessions = []

    def make(state, model=None, **options):
        model = mlp() if model is None else model
        writer = MemoryWriter()
        sessions.append(torchprobe.instrument(model, writer=writer, **options))
        sessions[-1].load_state_dict(state)
        return sessions[-1], model, writer

    yield make
    for session in sessions:
        session.detach()


def test_steps_go_on_counting_and_sampling(resume):
    session, model, writer = resume(stopped_at(7, every=4), every=4)
    assert session.step == 7
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 3, session)
    session.detach()
    assert session.step == 10
    assert writer.scalars("seen") == [(8, 8), (9, 9), (10, 10)]
    assert [step for step, _ in writer.scalars("overview/grad_norm")] == [8]


def test_what_is_seen_before_the_first_step_is_of_the_weights_that_the_checkpoint_holds(resume):
    """A validation right after a restart carries the checkpoint's step, as it would have in the killed run."""
    session, model, writer = resume(stopped_at(4), every=1)
    model.eval()
    model(inputs("mlp"))
    model.train()
    session.log_metrics({"accuracy": 1.0}, prefix="val")
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    session.detach()
    assert writer.scalars("val/accuracy") == [(4, 1.0)]
    assert {record.step for record in writer.records} == {4, 5}
    assert session.step == 5


def test_a_session_that_is_resumed_and_never_steps_writes_nothing(resume):
    session, _, writer = resume(stopped_at(4))
    session.flush()
    session.detach()
    assert writer.records == []


def test_two_optimizers_are_one_step_after_a_resume_too(resume):
    session, model, _ = resume(stopped_at(3))
    first, second = (torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 3))
    for _ in range(2):
        model(inputs("mlp")).square().mean().backward()
        first.step()
        second.step()
    assert session.step == 5


def test_a_clock_by_hand_stays_by_hand(resume):
    model = mlp()
    with torchprobe.instrument(model, writer=MemoryWriter()) as session:
        session.next_step()
        session.next_step()
        state = session.state_dict()
    session, model, _ = resume(state)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)
    assert session.step == 2
    session.next_step()
    assert session.step == 3


def test_skipped_and_dropped_are_counted_on(resume):
    state = stopped_at(2)
    state["parts"]["clock"]["skipped"] = 3
    state["parts"]["losses"].update(skipped=1, dropped=2)
    session, model, writer = resume(state)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    session.detach()
    assert writer.value("overview/skipped_steps") == 4
    assert writer.value("overview/dropped_records") == 2


def test_rules_remember_what_they_saw(resume):
    state = stopped_at(5, every=1)
    seen = state["parts"]["alerts"]["rules"]["exploding_gradient"]["values"]
    assert len(seen) == 5
    seen[:] = [1e-9] * 8  # long enough that the rule speaks at once
    state["parts"]["alerts"]["alerts"] = 7
    session, model, writer = resume(state, every=1)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    session.detach()
    assert [alert.rule for alert in session.alerts if alert.rule == "exploding_gradient"] == ["exploding_gradient"]
    assert writer.value("overview/alerts") >= 8


def test_training_is_untouched_by_a_resume(resume):
    state = stopped_at(5)
    torch.manual_seed(1)
    bare = mlp()
    torch.manual_seed(1)
    watched = mlp()
    resume(state, watched)
    results = []
    for model in (bare, watched):
        torch.manual_seed(2)
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)
        results.append((torch.cat([p.flatten() for p in model.parameters()]), torch.get_rng_state()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_state_of_another_model_is_refused_by_name(resume):
    with pytest.raises(ValueError, match=r"another model: .*saved one: 0\.bias, .*; .*this one: head\.bias"):
        resume(stopped_at(1), Other())


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)


@pytest.mark.parametrize("state", [{}, {"model": {}}, None, [1]])
def test_what_is_no_state_is_refused(state, resume):
    with pytest.raises(TypeError, match=r"takes what session\.state_dict\(\) returned"):
        resume(state)


def test_a_state_of_a_later_version_is_refused(resume):
    with pytest.raises(ValueError, match="upgrade"):
        resume({**stopped_at(1), "version": 99})


@pytest.mark.parametrize("value", ["x", None, -5, 10**30, math.nan, [], {"a": 1}, torch.zeros(3), "../../elsewhere"])
@pytest.mark.parametrize("path", [("version",), ("parameters",), ("parts",), ("parts", "clock"), ("parts", "run"),
                                  ("parts", "clock", "completed"), ("parts", "run", "run"), ("parts", "plan"),
                                  ("parts", "plan", "optimizers"), ("parts", "losses", "dropped"),
                                  ("parts", "alerts", "rules")])  # fmt: skip
def test_a_damaged_state_is_refused_whole_or_does_no_harm(path, value, tmp_path):
    model = mlp()
    with torchprobe.instrument(model, log_dir=tmp_path / "a") as session:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)
        state = session.state_dict()
    place = state
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with torchprobe.instrument(model, log_dir=tmp_path / "b", rules=["loss_spike"]) as session:
        try:
            session.load_state_dict(state)
        except (TypeError, ValueError) as error:
            assert "state" in str(error)  # noqa: PT017 - values that do no harm may be taken
            assert session.step == 0
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
        assert session.step in (1, 3)
    assert "stopped" not in str(session.summary())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]


def test_it_is_too_late_after_a_step(resume):
    state = stopped_at(2)
    session, model, _ = resume(state)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    with pytest.raises(RuntimeError, match="too late, after step 3"):
        session.load_state_dict(state)
    session.detach()
    with pytest.raises(RuntimeError, match="too late, the session is detached"):
        session.load_state_dict(state)


@pytest.mark.filterwarnings("ignore:.*global hooks")  # those of the loss capture; torch warns at each call
def test_a_wrapped_model_goes_on_as_the_bare_one(resume):
    model = torch.compile(mlp(), backend="eager")
    session, _, writer = resume(stopped_at(2), model, every=4)
    assert session.step == 2
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    session.detach()
    assert [step for step, _ in writer.scalars("activation_rms/0")] == [4]
