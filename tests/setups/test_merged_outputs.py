"""Activations of a module that runs several times: calls, micro-batches, recomputation, modes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import torchprobe
from tests.clocks import reproducible
from tests.setups.outputs import assert_moments, batch, sgd
from tests.setups.reference import l2, wide
from torchprobe.testing import MemoryWriter


class Twice(nn.Module):
    """Runs one module several times in a pass, on inputs of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = self.fc(x)
        second = self.fc(3 + 5 * first[:2])
        return first.mean() + self.fc(second[:1]).square().sum()


def collecting(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The module's outputs, and the gradients with respect to them, as they come."""
    outputs, slopes = [], []

    def hook(module, args, out):
        outputs.append(wide(out).flatten())
        if out.requires_grad:
            out.register_hook(lambda slope: slopes.append(wide(slope).flatten()))

    module.register_forward_hook(hook)
    return outputs, slopes


def test_a_module_that_runs_several_times_is_one_entry_with_merged_statistics():
    model, writer = Twice(), MemoryWriter()
    outputs, slopes = collecting(model.fc)
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(2):
            optimizer.zero_grad()
            model(batch(k)).backward()
            optimizer.step()
    for k in range(2):
        assert_moments(writer, "fc", torch.cat(outputs[3 * k : 3 * k + 3]), step=k + 1)
        slope = l2(*slopes[3 * k : 3 * k + 3])
        assert writer.value("activation_grad_norm/fc", k + 1) == pytest.approx(slope)


@pytest.mark.parametrize("sizes", [(5, 1, 3), (1,), (2, 7)])
def test_micro_batches_are_merged_exactly(sizes):
    model, writer = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), MemoryWriter()
    seen = {name: collecting(module) for name, module in model.named_children()}
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1, include="*"):
        for step in range(2):
            optimizer.zero_grad()
            for i, size in enumerate(sizes):
                (model(10 * i + batch(step, size)).square().mean() / len(sizes)).backward()
            optimizer.step()
    n = len(sizes)
    for name, (outputs, slopes) in seen.items():
        for step in range(2):
            assert_moments(writer, name, torch.cat(outputs[n * step : n * step + n]), step=step + 1)
            expected = l2(*slopes[n * step : n * step + n])
            assert writer.value(f"activation_grad_norm/{name}", step + 1) == pytest.approx(expected)


def test_gradients_of_activations_survive_in_place_relu():
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    model = copy.deepcopy(plain)
    model[1] = nn.ReLU(inplace=True)
    writers = [MemoryWriter(), MemoryWriter()]
    for each, writer in zip((plain, model), writers, strict=True):
        optimizer = sgd(each)
        with torchprobe.instrument(each, writer=writer, every=1, include="*"):
            each(batch()).square().mean().backward()
            optimizer.step()
    for name in "012":
        tag = f"activation_grad_norm/{name}"
        assert writers[1].value(tag) == pytest.approx(writers[0].value(tag), rel=1e-6)
        assert writers[1].value(f"activation_mean/{name}") == pytest.approx(writers[0].value(f"activation_mean/{name}"))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_part_counts_once(reentrant):
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            x = torch.utils.checkpoint.checkpoint(self[0], x, use_reentrant=reentrant)
            return self[1](x)

    plain = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    model = Checkpointed(*copy.deepcopy(plain))
    writers = [MemoryWriter(), MemoryWriter()]
    for each, writer in zip((plain, model), writers, strict=True):
        optimizer = sgd(each)
        with torchprobe.instrument(each, writer=writer, every=1) as session:
            for k in range(2):
                optimizer.zero_grad()
                each(batch(k).requires_grad_()).square().mean().backward()
                optimizer.step()
            assert session.step == 2
    for tag in writers[0].tags():
        if reproducible(tag) and writers[0].scalars(tag):
            assert writers[1].scalars(tag) == [(s, pytest.approx(v, rel=1e-5)) for s, v in writers[0].scalars(tag)], tag


def test_dropout_and_batch_norm_show_what_each_mode_computes():
    model = nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64), nn.Dropout(0.5))
    writer, outputs = MemoryWriter(), {True: [], False: []}
    model[2].register_forward_hook(lambda module, args, out: outputs[module.training].append(out.detach()))
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1, include=["1", "2"]):
        model(batch()).square().mean().backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            model(batch(1))
    assert_moments(writer, "2", outputs[True][0])
    assert_moments(writer, "2", outputs[False][0], prefix="val/")
    assert writer.value("activation_zero_fraction/2") > 0.3 > writer.value("val/activation_zero_fraction/2")
