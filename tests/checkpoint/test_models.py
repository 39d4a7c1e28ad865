"""Models however they are wrapped, and other models."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tests.checkpoint.run import Run, names
from tests.models import inputs, mlp


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
