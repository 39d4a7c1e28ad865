"""The training loss, found without a line in the user's code."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import Tensor, nn

import torchprobe
from tests.setups import losses as shared  # noqa: F401 - whose loss modules are made anew
from tests.setups.losses import CRITERION, TAG, WAYS, F, batch, losses, net, sgd
from torchprobe.testing import MemoryWriter


@pytest.mark.parametrize("way", WAYS)
def test_the_loss_of_every_step(way):
    model, writer, expected = net(), MemoryWriter(), []
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(3):
            x, y = batch(k)
            optimizer.zero_grad()
            loss = WAYS[way](model(x), y)
            expected.append(loss.item())
            loss.backward()
            optimizer.step()
    assert writer.scalars(TAG) == [(k + 1, pytest.approx(loss)) for k, loss in enumerate(expected)]


def test_at_every_step_whatever_is_sampled():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=3):
        for k in range(7):
            x, y = batch(k)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert [step for step, _ in writer.scalars(TAG)] == [1, 2, 3, 4, 5, 6, 7]


class Output(collections.OrderedDict):
    """What HuggingFace models return: a mapping with attributes."""

    def __getattr__(self, name: str) -> Tensor:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class Headed(nn.Module):
    """Computes its own loss when it gets labels."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.kind = kind

    def forward(self, x: Tensor, labels: Tensor | None = None):
        logits = self.fc(x)
        found = {"logits": logits}
        if labels is not None:
            found = {"loss": F.cross_entropy(logits, labels), **found}
        if self.kind == "dict":
            return found
        return Output(found) if self.kind == "model output" else collections.namedtuple("Out", found)(**found)


@pytest.mark.parametrize("kind", ["dict", "model output", "named tuple"])
def test_a_loss_in_the_models_output_is_there_at_every_step(kind):
    model, writer, expected = Headed(kind), MemoryWriter(), []
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=100):
        for k in range(4):
            optimizer.zero_grad()
            output = model(*batch(k))
            loss = output["loss"] if kind == "dict" else output.loss
            expected.append(loss.item())
            loss.backward()
            optimizer.step()
    assert writer.scalars(TAG) == [(k + 1, pytest.approx(loss)) for k, loss in enumerate(expected)]


def test_a_model_that_may_return_its_loss_but_did_not():
    model, writer, expected = Headed("model output"), MemoryWriter(), []
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(2):
            x, y = batch(k)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x).logits, y)
            expected.append(loss.item())
            loss.backward()
            optimizer.step()
    assert losses(writer) == pytest.approx(expected)


@pytest.mark.parametrize("way", ["loss module", "functional", "in the output"])
def test_with_accumulation_the_loss_is_the_mean_over_micro_batches(way):
    model, writer, expected = Headed("dict"), MemoryWriter(), []
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1):
        for sizes in ((3, 1, 5), (2, 4)):
            optimizer.zero_grad()
            parts = []
            for i, size in enumerate(sizes):
                x, y = batch(i, size)
                loss = model(x, y)["loss"] if way == "in the output" else WAYS[way](model(x)["logits"], y)
                parts.append(loss.item())
                (loss / len(sizes)).backward()
            expected.append(sum(parts) / len(parts))
            optimizer.step()
    assert losses(writer) == pytest.approx(expected)


@pytest.mark.parametrize("way", ["loss module", "functional"])
def test_losses_of_several_passes_with_one_backward_are_the_total(way):
    model, writer, expected = net(), MemoryWriter(), []
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(2):
            (x1, y1), (x2, y2) = batch(k), batch(k + 10)
            optimizer.zero_grad()
            first, second = model(x1), model(x2)
            total = WAYS[way](first, y1) + 2 * WAYS[way](second, y2)
            expected.append(total.item())
            total.backward()
            optimizer.step()
    assert losses(writer) == pytest.approx(expected)


def test_a_loss_that_is_changed_in_place_afterwards():
    model, writer = net(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1):
        x, y = batch()
        loss = F.cross_entropy(model(x), y)
        expected = loss.item()
        loss.backward()
        loss.data.zero_()
        optimizer.step()
    assert losses(writer) == pytest.approx([expected])


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("conjugated", [False, True], ids=["with graphs", "conjugated"])
def test_gradients_that_numpy_refuses(conjugated, caplog):
    """`backward(create_graph=True)`, as second-order optimizers call it, and a complex gradient that is a view."""
    kind = torch.cfloat if conjugated else torch.float
    model, writer, right, norms = nn.Linear(3, 2, dtype=kind), MemoryWriter(), [], []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, every=1):
        for _ in range(4):
            loss = model(torch.randn(4, 3, dtype=kind)).abs().square().mean()
            loss.backward(create_graph=not conjugated)
            for p in model.parameters() if conjugated else ():
                p.grad = p.grad.conj()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            right.append(loss.item())
            norms.append(gradient.detach().abs().norm().item())
            optimizer.step()
            for p in model.parameters():  # the optimizer's own would be refused by a gradient with a graph
                p.grad = None
    assert losses(writer) == pytest.approx(right)
    assert [value for _, value in writer.scalars("overview/grad_norm")] == pytest.approx(norms)
    assert "stops recording" not in caplog.text


def test_a_loss_in_bfloat16():
    model, writer = net().bfloat16(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1):
        x, y = batch()
        loss = F.cross_entropy(model(x.bfloat16()), y)
        loss.backward()
        optimizer.step()
    assert losses(writer) == [loss.item()]


def test_of_a_closure_that_lbfgs_evaluates_several_times_the_last_loss_counts():
    model, writer, seen = net(), MemoryWriter(), []
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    x, y = batch()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = CRITERION(model(x), y)
        seen.append(loss.item())
        loss.backward()
        return loss

    with torchprobe.instrument(model, writer=writer, every=1):
        optimizer.step(closure)
    assert len(seen) > 1
    assert losses(writer) == pytest.approx(seen[-1:])  # whose gradient the step ended with


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("way", WAYS)
def test_the_scale_of_a_grad_scaler_is_taken_out(way, fused):
    model, writer, expected = net(), MemoryWriter(), []
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(3):
            x, y = batch(k)
            optimizer.zero_grad()
            loss = WAYS[way](model(x), y)
            expected.append(loss.item())
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert losses(writer) == pytest.approx(expected)
