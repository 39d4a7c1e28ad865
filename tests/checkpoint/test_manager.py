"""Saving and restoring a run."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import torchprobe
from tests.checkpoint.run import Run, names
from tests.models import mlp
from torchprobe import CheckpointManager
from torchprobe.checkpoint.files import stored
from torchprobe.checkpoint.states import checked_metrics
from torchprobe.testing import MemoryWriter


def test_a_restored_run_is_bitwise_the_uninterrupted_one(manager):
    whole = Run()
    whole.train(9)
    first = Run()
    first.train(5)
    manager.save_checkpoint(*first.parts, 0, 5, {"val_loss": 0.5})
    first.train(2)  # what is lost
    second = Run(seed=7)
    info = CheckpointManager(manager.directory).restore(*second.parts)
    assert info == {"epoch": 0, "step": 5, "metrics": {"val_loss": 0.5}}
    second.train(4)
    assert torch.equal(second.weights, whole.weights)
    assert second.scheduler.get_last_lr() == whole.scheduler.get_last_lr()
    assert torch.equal(torch.rand(3), uninterrupted_draw(9))


def uninterrupted_draw(steps):
    run = Run()
    run.train(steps)
    return torch.rand(3)


def test_without_a_checkpoint_nothing_is_restored(manager):
    run = Run()
    before, drawn = run.weights.clone(), torch.get_rng_state()
    assert manager.restore(*run.parts) is None
    assert manager.load_latest() is None
    assert manager.load_best() is None
    assert torch.equal(run.weights, before)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_the_newest_and_the_best_are_kept(manager):
    run = Run()
    for step, loss in enumerate([0.9, 0.1, 0.5, 0.4, 0.3, 0.2], start=1):
        manager.save_checkpoint(*run.parts, 0, step, {"val_loss": loss})
    assert names(manager) == [
        "step_0000000002.best.pt",
        "step_0000000004.pt",
        "step_0000000005.pt",
        "step_0000000006.pt",
    ]
    assert manager.load_best()["metrics"] == {"val_loss": 0.1}
    assert manager.load_latest()["step"] == 6
    assert CheckpointManager(manager.directory).restore(*run.parts, which="best")["step"] == 2


def test_a_run_that_goes_back_to_its_best_goes_on_from_there(manager):
    """What it left behind is older, whatever its step, and is not what a second restart finds."""
    run = Run()
    for step, loss in ((10, 0.1), (20, 0.5), (30, 0.9)):
        manager.save_checkpoint(*run.parts, 0, step, {"val_loss": loss})
    again = CheckpointManager(manager.directory)
    assert again.restore(*run.parts, which="best")["step"] == 10
    assert again.save_checkpoint(*run.parts, 0, 15, {"val_loss": 0.3}).exists()
    assert again.load_latest()["step"] == 15
    assert CheckpointManager(manager.directory).restore(*run.parts)["step"] == 15
    again.save_checkpoint(*run.parts, 0, 20, {"val_loss": 0.2})
    again.save_checkpoint(*run.parts, 0, 25, {"val_loss": 0.05})
    assert [one.step for one in stored(manager.directory)] == [15, 20, 25]
    assert again.load_latest()["step"] == again.load_best()["step"] == 25


def test_a_new_manager_knows_the_best_of_the_one_before(manager):
    run = Run()
    manager.save_checkpoint(*run.parts, 0, 1, {"val_loss": 0.1})
    again = CheckpointManager(manager.directory)
    again.save_checkpoint(*run.parts, 0, 2, {"val_loss": 0.2})
    assert again.load_best()["step"] == 1
    again.save_checkpoint(*run.parts, 0, 3, {"val_loss": 0.05})
    assert again.load_best()["step"] == 3


@pytest.mark.parametrize(
    ("options", "metrics", "best"),
    [
        ({}, [{"val_loss": 2.0}, {"val_loss": 1.0}, {"val_loss": float("nan")}, {"val_loss": 3.0}], 2),
        ({}, [{"loss": 1.0, "val_loss": 3.0}, {"loss": 2.0, "val_loss": 2.0}], 2),
        ({}, [{"val_loss": float("nan")}, {"val_loss": 5.0}, {}], 2),
        ({"metric": "acc", "mode": "max"}, [{"acc": 0.1}, {"acc": 0.3}, {"acc": 0.2}], 2),
        ({"metric": "acc", "mode": "max"}, [{"acc": torch.tensor(0.3)}, {"acc": np.float32(0.2)}], 1),
        ({}, [{"accuracy": 0.1}, {"accuracy": 0.9}], None),
    ],
)
def test_the_best_is_judged_by_metric_and_mode(tmp_path, options, metrics, best):
    manager = CheckpointManager(tmp_path, max_keep=9, **options)
    run = Run()
    for step, values in enumerate(metrics, start=1):
        manager.save_checkpoint(*run.parts, 0, step, values)
    found = manager.load_best()
    assert (found and found["step"]) == best


def test_the_caller_may_judge_by_himself(manager):
    run = Run()
    manager.save_checkpoint(*run.parts, 0, 1, {"val_loss": 1.0}, True)
    manager.save_checkpoint(*run.parts, 0, 2, {"val_loss": 0.5}, False)
    assert manager.load_best()["step"] == 1


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"step": None}, TypeError, "step=None"),
        ({"step": -1}, ValueError, "step=-1"),
        ({"step": 1, "metrics": [1]}, TypeError, "metrics="),
        ({"step": 1, "metrics": {"loss": "low"}}, TypeError, r"metrics\['loss'\]='low'"),
        ({"step": 1, "metrics": {"loss": torch.ones(2)}}, TypeError, r"metrics\['loss'\]"),
        ({"step": 1, "optimizer": 3}, TypeError, "optimizer=3"),
        ({"step": 1, "optimizer": torch.nn.Linear(1, 1)}, TypeError, "optimizer=Linear.*no model"),
    ],
)
def test_a_wrong_argument_is_named(manager, arguments, error, words):
    with pytest.raises(error, match=words):
        manager.save_checkpoint(mlp(), **arguments)
    assert names(manager) == []


def test_a_metric_that_is_not_among_them_is_a_typo(tmp_path):
    manager = CheckpointManager(tmp_path, metric="val_acc", mode="max")
    with pytest.raises(ValueError, match=r"no 'val_acc'.*\['val_accuracy'\]"):
        manager.save_checkpoint(mlp(), step=1, metrics={"val_accuracy": 1.0})
    manager.save_checkpoint(mlp(), step=1)


# With a session


def test_the_session_goes_on_and_its_best_metrics_show(manager):
    run, writer = Run(), MemoryWriter()
    with torchprobe.instrument(run.model, writer=writer):
        for loss in (0.5, 0.7, 0.3):
            run.train(2)
            manager.save_checkpoint(*run.parts, metrics={"val_loss": loss})
    assert writer.scalars("best/val_loss") == [(2, 0.5), (6, pytest.approx(0.3))]
    again = Run()
    with torchprobe.instrument(again.model, writer=MemoryWriter()) as session:
        assert manager.restore(*again.parts)["step"] == 6
        assert session.step == 6
        again.train(1)
        assert session.step == 7


def test_the_best_that_was_restored_in_the_middle_of_a_run_does_not_turn_the_clock_back(manager):
    run = Run()
    with torchprobe.instrument(run.model, writer=MemoryWriter()) as session:
        run.train(1)
        manager.save_checkpoint(*run.parts, metrics={"val_loss": 0.1})
        run.train(2)
        manager.restore(*run.parts, which="best")
        assert session.step == 3


def test_a_session_that_is_handed_over_is_the_one(tmp_path):
    run, other = Run(), mlp()
    with torchprobe.instrument(other, writer=MemoryWriter()) as session:
        manager = CheckpointManager(tmp_path, session=session)
        session.next_step()
        manager.save_checkpoint(run.model)
    assert manager.load_latest()["step"] == 1


def test_a_model_and_an_optimizer_that_changed_places_are_named_by_the_model(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(TypeError, match=r"(?s)model=SGD.*takes a torch.nn.Module, not SGD"):
        CheckpointManager(tmp_path).restore(optimizer, model)
    with pytest.raises(TypeError, match=r"(?s)model=SGD.*takes a torch.nn.Module, not SGD"):
        CheckpointManager(tmp_path).save_checkpoint(optimizer, model, None, 0, 1, {})


def test_a_metric_beyond_float64_is_infinite():
    assert checked_metrics({"loss": 10**400, "accuracy": 0.5}) == {"loss": math.inf, "accuracy": 0.5}
