"""Saving and restoring a run."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import torchprobe
from tests.models import inputs, mlp
from torchprobe import CheckpointManager
from torchprobe.checkpoint.files import stored
from torchprobe.testing import MemoryWriter


class Run:
    """A model with dropout, its optimizer and scheduler, and training that draws from every generator."""

    def __init__(self, model=None, seed=0):
        for seeded in (torch.manual_seed, random.seed, np.random.seed):
            seeded(seed)
        self.model = mlp() if model is None else model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.1, total_steps=100)

    def train(self, steps):
        for _ in range(steps):
            noise = torch.randn(6, 4) + random.random() + np.random.rand()
            self.model(inputs("mlp") + noise).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()

    @property
    def parts(self):
        return self.model, self.optimizer, self.scheduler

    @property
    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


@pytest.fixture
def manager(tmp_path):
    return CheckpointManager(tmp_path / "checkpoints")


def names(manager):
    return sorted(path.name for path in manager.directory.iterdir())


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


def test_a_step_saved_twice_is_there_once(manager):
    run = Run()
    manager.save_checkpoint(*run.parts, 0, 1, {"val_loss": 1.0})
    manager.save_checkpoint(*run.parts, 0, 1, {"val_loss": 2.0})
    assert names(manager) == ["step_0000000001.pt"]
    assert manager.load_latest()["metrics"] == {"val_loss": 2.0}


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not a checkpoint")
    else:  # one bit, in the middle of the weights
        at = data.index(b"PK\x03\x04", len(data) // 3) - 64
        data[at] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "one bit"])
def test_a_damaged_file_is_skipped_with_a_warning_and_the_one_before_is_loaded(manager, how, caplog):
    run = Run()
    for step in (1, 2):
        run.train(1)
        manager.save_checkpoint(*run.parts, 0, step, {})
    damage(manager.directory / "step_0000000002.pt", how)
    with caplog.at_level(logging.WARNING, "torchprobe"):
        assert manager.restore(*run.parts)["step"] == 1
        assert manager.load_latest()["step"] == 1
    assert "step_0000000002.pt is damaged and skipped" in caplog.text


def test_when_all_are_damaged_the_run_does_not_silently_begin_anew(manager):
    run = Run()
    manager.save_checkpoint(*run.parts, 0, 1, {})
    damage(manager.directory / "step_0000000001.pt", "truncated")
    assert manager.load_latest() is None
    with pytest.raises(RuntimeError, match=r"all 1 checkpoints in .* are damaged"):
        manager.restore(*run.parts)


def test_a_foreign_file_of_that_name_is_skipped(manager):
    torch.save({"weights": torch.ones(1)}, manager.directory / "step_0000000009.pt")
    assert manager.load_latest() is None


def test_loading_runs_no_code(manager, tmp_path, caplog):
    class Evil:
        def __reduce__(self):
            return (print, ("it ran",))

    torch.save(Evil(), manager.directory / "step_0000000009.pt")
    with caplog.at_level(logging.WARNING, "torchprobe"):
        assert manager.load_latest() is None
    assert "damaged" in caplog.text


def wrapped(kind):
    model = mlp()
    if kind == "compiled":
        return torch.compile(model, backend="eager")
    if kind == "compiled inside":
        model[0] = torch.compile(model[0], backend="eager")
    if kind == "checkpointed":
        model[3] = checkpoint_wrapper(model[3])
    if kind == "averaged":
        return torch.optim.swa_utils.AveragedModel(model)
    if kind == "parallel inside":
        model[0] = nn.DataParallel(model[0])
    return model


KINDS = ["bare", "compiled", "compiled inside", "checkpointed", "averaged", "parallel inside"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrapped_model_is_saved_under_bare_names_and_restored_into_any(manager, kind):
    model = wrapped(kind)
    manager.save_checkpoint(model, step=1)
    saved = manager.load_latest()["model"]
    assert sorted(saved) == ["0.bias", "0.weight", "3.bias", "3.weight"]
    for other in KINDS:
        target = wrapped(other)
        manager.restore(target)
        own = dict(zip(sorted(saved), sorted(target.state_dict()), strict=False)) if other != "averaged" else {}
        assert all(torch.equal(target.state_dict()[key], saved[name]) for name, key in own.items())
        values = sorted(p.sum().item() for p in target.parameters())
        assert values == sorted(v.sum().item() for v in saved.values())


def test_buffers_and_versions_of_modules_survive(manager):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    model(torch.randn(5, 4))
    manager.save_checkpoint(model, step=1)
    saved = manager.load_latest()["model"]
    assert saved["1.num_batches_tracked"] == 1
    assert saved._metadata == model.state_dict()._metadata
    other = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    manager.restore(other)
    assert torch.equal(other[1].running_mean, model[1].running_mean)


def test_another_model_is_refused_with_the_names_that_differ(manager):
    run = Run()
    manager.save_checkpoint(*run.parts, 0, 1, {})
    other = nn.Sequential(nn.Linear(4, 8), nn.Identity(), nn.Linear(8, 3))
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(ValueError, match=r"another model: .*saved one: 3\.bias, 3\.weight; .*this one: 2\.bias, 2\.w"):
        manager.restore(other)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_another_shape_is_refused_too(manager):
    manager.save_checkpoint(mlp(), step=1)
    other = mlp()
    other[3] = nn.Linear(8, 5)
    with pytest.raises(ValueError, match=r"shapes differ: 3\.weight \(3, 8\) against \(5, 8\)"):
        manager.restore(other, strict=False)


def test_without_strict_the_names_in_common_are_loaded(manager):
    model = mlp()
    manager.save_checkpoint(model, step=1)
    other = nn.Sequential(*mlp(), nn.Linear(3, 2))
    manager.restore(other, strict=False)
    assert torch.equal(other[0].weight, model[0].weight)


def test_what_was_not_saved_cannot_be_restored(manager):
    run = Run()
    manager.save_checkpoint(run.model, step=1)
    with pytest.raises(ValueError, match="holds no optimizer"):
        manager.restore(run.model, run.optimizer)


def test_an_optimizer_of_other_groups_is_refused_before_anything_changes(manager):
    run = Run()
    manager.save_checkpoint(*run.parts, 0, 1, {})
    other = mlp()
    before = other[0].weight.clone()
    with pytest.raises(ValueError, match=r"AdamW has groups of \[4\] parameters, and this one of \[2\]"):
        manager.restore(other, torch.optim.AdamW(other[0].parameters()))
    assert torch.equal(other[0].weight, before)


def test_several_optimizers_and_extras(manager):
    def make():
        torch.manual_seed(0)
        model = mlp()
        optimizers = {"a": torch.optim.AdamW(model[0].parameters()), "b": torch.optim.SGD(model[3].parameters(), 0.1)}
        schedulers = [torch.optim.lr_scheduler.MultiStepLR(o, [1, 3]) for o in optimizers.values()]
        return model, optimizers, schedulers, {"scaler": torch.amp.GradScaler("cpu", init_scale=8.0)}

    model, optimizers, schedulers, extras = make()
    model(inputs("mlp")).sum().backward()
    for one in (*optimizers.values(), *schedulers):
        one.step()
    manager.save_checkpoint(model, optimizers, schedulers, 3, 1, extras=extras)
    model, optimizers, schedulers, extras = make()
    extras["scaler"] = torch.amp.GradScaler("cpu", init_scale=2.0)
    assert manager.restore(model, optimizers, schedulers, extras=extras)["epoch"] == 3
    assert extras["scaler"].get_scale() == 8.0
    assert optimizers["a"].state
    assert [s.last_epoch for s in schedulers] == [1, 1]


def test_a_state_that_could_not_be_loaded_again_is_refused_when_it_is_saved(manager):
    run = Run()

    class Odd:
        def state_dict(self):
            return {"history": [1, {"when": object()}]}

        load_state_dict = None

    with pytest.raises(TypeError, match=r"the state of extras\['odd'\]\['history'\]\[1\]\['when'\] is a object, which"):
        manager.save_checkpoint(*run.parts, 0, 1, {}, extras={"odd": Odd()})
    assert names(manager) == []


def test_a_full_disk_is_an_oserror_that_leaves_what_there_was(manager, full_disk):
    run = Run()
    manager.save_checkpoint(*run.parts, 0, 1, {})
    before = names(manager)
    with (
        full_disk(3000),
        pytest.raises(OSError, match=r"the checkpoint of step 2 could not be written .* as they were"),
    ):
        manager.save_checkpoint(*run.parts, 0, 2, {})
    assert names(manager) == before
    assert manager.load_latest()["step"] == 1


def test_a_directory_that_cannot_be_made_says_so(tmp_path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(OSError, match="taken"):
        CheckpointManager(tmp_path / "taken")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_keep": 0}, ValueError, "max_keep=0"),
        ({"metric": 3}, TypeError, "metric=3"),
        ({"mode": "most"}, ValueError, "mode='most'.*'min'"),
        ({"mode": "max"}, ValueError, "needs metric="),
        ({"session": "s"}, TypeError, r"session='s'.*torchprobe\.instrument"),
    ],
)
def test_a_wrong_option_is_named(tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        CheckpointManager(tmp_path, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"step": None}, TypeError, "step=None"),
        ({"step": -1}, ValueError, "step=-1"),
        ({"step": 1, "metrics": [1]}, TypeError, "metrics="),
        ({"step": 1, "metrics": {"loss": "low"}}, TypeError, r"metrics\['loss'\]='low'"),
        ({"step": 1, "metrics": {"loss": torch.ones(2)}}, TypeError, r"metrics\['loss'\]"),
        ({"step": 1, "optimizer": 3}, TypeError, "optimizer=3"),
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
