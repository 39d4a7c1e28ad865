"""A list of networks that has no `forward`, and whose members are called one by one: critics, peers, players."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, nll_loss
from torch.utils.checkpoint import checkpoint

import torchprobe
from torchprobe.testing import MemoryWriter

STEPS, ROWS, CLASSES = 4, 16, 3


def net(drops: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(drops), nn.Tanh(), nn.Linear(8, CLASSES))


def twins(drops: float) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList([net(drops), net(drops)])


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, 4), torch.randint(0, CLASSES, (ROWS,))


def train(model: nn.ModuleList, writer: MemoryWriter | None, together: bool, detach_at: int = 0) -> list[float]:
    losses, optimizer = [], torch.optim.SGD(model.parameters(), 0.1)
    if detach_at:
        model[0].register_forward_hook(lambda *_: detach_inside())
    session = writer and torchprobe.instrument(model, writer=writer, every=1)

    def detach_inside() -> None:
        if session is not None and len(losses) == detach_at:
            session.detach()

    torch.manual_seed(1)
    for _ in range(STEPS):
        x, y = batch()
        logits = [member(x) for member in model]
        mean = torch.stack([z.softmax(-1) for z in logits]).mean(0).log()
        loss = nll_loss(mean, y) if together else sum(cross_entropy(z, y) for z in logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if session is not None:
        session.detach()
    return losses


@pytest.mark.parametrize("detach_at", [0, 1])
@pytest.mark.parametrize("drops", [0.0, 0.5])
def test_training_is_the_same_and_each_loss_stands_in_its_step(drops, detach_at):
    writer, model = MemoryWriter(), twins(drops)
    losses = train(model, writer, False, detach_at)
    assert losses == train(twins(drops), None, False)
    found = dict(writer.scalars("overview/loss"))
    assert found == pytest.approx(dict(enumerate(losses[: detach_at or STEPS], 1)))
    assert sum(len(module._forward_hooks) for module in model.modules()) == (detach_at > 0)  # the user's own


@pytest.mark.parametrize("drops", [0.0, 0.5])
@pytest.mark.parametrize("together", [False, True])
def test_passes_of_two_networks_are_no_members_of_one_prediction_and_no_repetition(drops, together, caplog):
    writer = MemoryWriter()
    with caplog.at_level(logging.WARNING, "torchprobe"):
        train(twins(drops), writer, together)
    assert not [tag for tag in writer.tags() if tag.startswith("uncertainty_epistemic")]
    assert "more than once with one input" not in caplog.text
    if not together:
        assert {value for _, value in writer.scalars("calibration/count")} == {2.0 * ROWS}


@pytest.mark.parametrize("again", ["", "0", "01", "02", "12", "012"])
def test_parts_that_reentrant_checkpoints_run_again_have_the_loss_once(again):
    torch.manual_seed(0)
    model, writer, right = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)]), MemoryWriter(), {}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with torchprobe.instrument(model, writer=writer, every=2):
        for k in range(1, STEPS + 1):
            h, y = batch()
            h.requires_grad_()
            for i, part in enumerate(model):
                h = checkpoint(part, h, use_reentrant=True) if str(i) in again else part(h)
                h = h.tanh()
            loss = cross_entropy(h, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            right[k] = loss.item()
    assert dict(writer.scalars("overview/loss")) == pytest.approx(right)
    assert [step for step, _ in writer.scalars("activation_mean/1")] == [1, 2, 4]


class Ensemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.members = twins(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([member(x) for member in self.members]).mean(0)


@pytest.mark.parametrize("where", ["", "members.0", "members.0.3"])
@pytest.mark.parametrize("before", [False, True])
def test_a_session_may_end_inside_of_any_call(where, before):
    model = Ensemble()
    part = model.get_submodule(where)

    def end(*_: object) -> None:
        session.detach()

    for _ in range(2):
        handle = (part.register_forward_pre_hook if before else part.register_forward_hook)(end)
        session = torchprobe.instrument(model, writer=MemoryWriter(), every=1)
        model(torch.randn(ROWS, 4)).sum().backward()
        handle.remove()
        assert not session.attached
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("drop", ["graph", "gradients", "numbers"])
@pytest.mark.parametrize("named", [False, True])
def test_a_frozen_first_part_shares_the_fate_of_what_follows_it(named, drop):
    """Its own output has no graph that would tell."""
    torch.manual_seed(0)
    first, head = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, CLASSES)
    model = nn.ModuleDict({"0": first, "1": head}) if named else nn.ModuleList([first, head])
    optimizer, writer, right = torch.optim.SGD(head.parameters(), 0.1), MemoryWriter(), {}
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(1, 5):
            if k % 2 == 0:
                dropped = head(first(torch.full((8, 4), math.nan if drop == "numbers" else 100.0))).sum()
                if drop == "gradients":
                    dropped.backward()
                    optimizer.zero_grad()
                del dropped
            hidden = [first(torch.randn(8, 4)) for _ in range(2)]
            right[k] = torch.cat(hidden).mean().item()
            optimizer.zero_grad()
            sum(head(h).square().mean() for h in hidden).backward()
            optimizer.step()
    assert dict(writer.scalars("activation_mean/0")) == pytest.approx(right, rel=1e-4, abs=1e-6)
    assert writer.value("overview/skipped_steps") == (2 if drop == "numbers" else 0)
    assert session.step == 4
