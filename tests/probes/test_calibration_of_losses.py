"""Targets from losses of every kind."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchprobe
from tests.probes.calibrated import assert_calibration, batch, net, watch
from torchprobe.capture.predictions import forms
from torchprobe.testing import MemoryWriter


def by_hand(out: Tensor, y: Tensor) -> Tensor:
    return -out.log_softmax(-1)[torch.arange(len(y)), y].mean()


LOSSES = {
    "module": nn.CrossEntropyLoss(),
    "module, keywords": lambda out, y: nn.CrossEntropyLoss()(input=out, target=y),
    "functional": F.cross_entropy,
    "by hand": by_hand,
    "nll module": lambda out, y: nn.NLLLoss()(out.log_softmax(-1), y),
    "functional nll": lambda out, y: F.nll_loss(out.log_softmax(-1), y),
    "smoothed": lambda out, y: F.cross_entropy(out, y, label_smoothing=0.1),
    "smoothed module": nn.CrossEntropyLoss(label_smoothing=0.1),
    "weighted": lambda out, y: F.cross_entropy(out, y, weight=torch.arange(1.0, 6.0)),
    "sum": lambda out, y: F.cross_entropy(out, y, reduction="sum"),
    "with weight decay in the loss": lambda out, y: F.cross_entropy(out, y) + 1e-3 * out.new_ones(3).square().sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_the_targets_of_every_kind_of_cross_entropy(loss):
    model, writer = net(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01 if loss == "sum" else 0.5)
    p, y = [], []
    with watch(model, writer):
        for step in range(3):
            x, targets = batch(step)
            out = model(x)
            p.append(out.softmax(-1))
            y.append(targets)
            optimizer.zero_grad()
            LOSSES[loss](out, targets).backward()
            optimizer.step()
    for step in (1, 3):
        assert_calibration(writer, step, p[step - 1], y[step - 1])


def test_targets_that_are_ignored_are_left_out():
    for loss in (F.cross_entropy, nn.CrossEntropyLoss()):
        model, writer = net(), MemoryWriter()
        x, y = batch(0)
        y[::3] = -100
        with watch(model, writer) as session:
            out = model(x)
            loss(out, y).backward()
            session.next_step()
        assert_calibration(writer, 1, out.softmax(-1)[y >= 0], y[y >= 0])


HARDEST = {
    "topk": lambda losses: losses.topk(16).values.mean(),
    "sorted": lambda losses: losses.sort(descending=True).values[:16].mean(),
    "above a threshold": lambda losses: losses[losses > 2].mean(),
    "masked above it": lambda losses: (losses * (losses > 2)).sum() / (losses > 2).sum(),
}
EACH = {
    "functional": lambda out, y: F.cross_entropy(out, y, reduction="none"),
    "by hand": lambda out, y: -out.log_softmax(-1).gather(1, y[:, None])[:, 0],
    "module": nn.CrossEntropyLoss(reduction="none"),
    "smoothed, weighted module": nn.CrossEntropyLoss(torch.arange(1.0, 6), reduction="none", label_smoothing=0.1),
}


@pytest.mark.parametrize("chosen", [*HARDEST, "by a mask"])
@pytest.mark.parametrize("each", EACH)
def test_examples_that_are_chosen_by_their_loss_are_no_sample(chosen, each):
    model, writer, (x, y) = net(), MemoryWriter(), batch(0)
    model[2].weight.data.mul_(12)
    mask = torch.arange(32) % 3 > 0
    with watch(model, writer) as session:
        out = model(x)
        HARDEST.get(chosen, lambda losses: losses[mask].mean())(EACH[each](out, y)).backward()
        session.next_step()
    tells = "module" in each or chosen == "by a mask"
    if tells and writer.scalars("calibration/nll"):
        kept = mask if chosen == "by a mask" else ...
        assert_calibration(writer, 1, out.softmax(-1)[kept], y[kept], rel=1e-4)
    else:
        assert not [tag for tag in writer.tags() if tag.startswith("calibration")]
        assert not tells or "smoothed" in each
    assert writer.scalars("uncertainty_total/root") or "smoothed" in each


@pytest.mark.parametrize("layout", ["(B, T, V) flattened", "(B, V, T) by transposing", "shifted"])
@pytest.mark.parametrize("kind", ["module", "functional"])
def test_sequences(layout, kind):
    loss = nn.CrossEntropyLoss() if kind == "module" else F.cross_entropy
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11))
    writer = MemoryWriter()
    ids = torch.randint(0, 11, (6, 7))
    with watch(model, writer) as session:
        out = model(ids)
        p, y = out.softmax(-1), ids
        if layout == "(B, T, V) flattened":
            loss(out.flatten(0, 1), ids.flatten()).backward()
        elif layout == "(B, V, T) by transposing":
            loss(out.transpose(1, 2), ids).backward()
        else:
            p, y = p[:, :-1], ids[:, 1:]
            loss(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        session.next_step()
    assert_calibration(writer, 1, p.flatten(0, 1), y.flatten())
    entropy = torch.special.entr(out.softmax(-1)).sum(-1).mean().item()
    assert writer.value("uncertainty_total/root", 1) == pytest.approx(entropy, rel=1e-5)


PARTS = {
    "time steps": lambda out, ids: sum(F.cross_entropy(out[:, t], ids[:, t]) for t in range(7)),
    "sequences": lambda out, ids: sum(F.cross_entropy(one, y) for one, y in zip(out, ids, strict=True)),
    "halves of all": lambda out, ids: (
        F.cross_entropy(out.flatten(0, 1)[:21], ids.flatten()[:21])
        + F.nll_loss(out.flatten(0, 1)[21:].log_softmax(-1), ids.flatten()[21:])
    ),
    "logarithms of all": lambda out, ids: sum(
        F.nll_loss(p, y) for p, y in zip(out.log_softmax(-1).unbind(1), ids.unbind(1), strict=True)
    ),
    "weighed steps": lambda out, ids: sum((t + 1) * F.cross_entropy(out[:, t], ids[:, t]) for t in range(7)),
    "steps, twice": lambda out, ids: sum(
        F.cross_entropy(out[:, t], ids[:, t]) + F.cross_entropy(out[:, t], ids[:, t - 1]) for t in range(7)
    ),
}


@pytest.mark.parametrize("parts", PARTS)
def test_a_loss_that_is_added_up_of_parts_of_the_output(parts):
    """As in loops over time steps; not where the parts differ in their weight or ask for two things."""
    model, writer = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11)), MemoryWriter()
    ids = torch.randint(0, 11, (6, 7), generator=torch.Generator().manual_seed(1))
    with watch(model, writer) as session:
        out = model(ids)
        PARTS[parts](out, ids).backward()
        session.next_step()
    if parts in ("weighed steps", "steps, twice"):
        assert not writer.scalars("calibration/nll")
    else:
        assert_calibration(writer, 1, out.softmax(-1).flatten(0, 1), ids.flatten())


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), F.cross_entropy], ids=["module", "functional"])
def test_classes_in_the_second_dimension(loss):
    model, writer, loss = nn.Conv2d(1, 5, 3), MemoryWriter(), copy.deepcopy(loss)
    x, y = torch.randn(3, 1, 6, 6), torch.randint(0, 5, (3, 4, 4))
    with watch(model, writer) as session:
        out = model(x)
        loss(out, y).backward()
        session.next_step()
    assert_calibration(writer, 1, out.softmax(1).movedim(1, -1).flatten(0, 2), y.flatten())
    entropy = torch.special.entr(out.softmax(1)).sum(1).mean().item()
    assert writer.value("uncertainty_total/root", 1) == pytest.approx(entropy, rel=1e-5)


@pytest.mark.parametrize("kind", ["module", "functional", "pos_weight"])
@pytest.mark.parametrize("shape", [(64,), (64, 1), (16, 7)])
def test_binary_cross_entropy(kind, shape):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, shape[-1] if len(shape) > 1 else 1)

        def forward(self, x):
            return self.fc(x).view(shape)

    losses = {
        "module": nn.BCEWithLogitsLoss(),
        "functional": F.binary_cross_entropy_with_logits,
        "pos_weight": lambda z, y: F.binary_cross_entropy_with_logits(z, y, pos_weight=torch.tensor(2.5)),
    }
    model, writer = Head(), MemoryWriter()
    y = torch.randint(0, 2, shape).float()
    with watch(model, writer) as session:
        out = model(torch.randn(shape[0], 4))
        losses[kind](out, y).backward()
        session.next_step()
    assert_calibration(writer, 1, out.sigmoid().flatten(), y.flatten())
    assert "calibration/auroc" in writer.tags()
    assert "calibration_precision_recall/predictions" in writer.tags()


OTHER_LOSSES = {
    "squared error": lambda out, y: F.mse_loss(out, F.one_hot(y, 5).float()),
    "margin": F.multi_margin_loss,
    "anything": lambda out, y: out.square().mean(),
    "module of squared error": lambda out, y: nn.MSELoss()(out, torch.randn(out.shape)),
    "temperature": lambda out, y: F.cross_entropy(out / 3, y),
}


@pytest.mark.parametrize("loss", OTHER_LOSSES)
def test_nothing_is_claimed_of_another_loss(loss):
    model, writer = net(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, writer) as session:
        for step in range(3):
            x, y = batch(step)
            optimizer.zero_grad()
            OTHER_LOSSES[loss](model(x), y).backward()
            optimizer.step()
        session.flush()
        assert "nothing captured  Uncertainty, Calibration" in session.summary()
    assert not any("calibration" in tag or "uncertainty" in tag for tag in writer.tags())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [2, 5, 300])
def test_under_autocast_with_a_scaler(dtype, classes):
    model, writer = net(classes=classes), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    with watch(model, writer):
        x, y = batch(0, 64, classes)
        with torch.autocast("cpu", dtype=dtype):
            out = model(x)
            loss = F.cross_entropy(out, y) / 4
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert out.dtype == dtype
    assert_calibration(writer, 1, out.float().softmax(-1), y)


@pytest.mark.parametrize("judges_it", [True, False])
def test_a_variance_given_to_the_loss_module_is_the_outputs_only_if_that_is_judged(monkeypatch, judges_it):
    monkeypatch.setattr(forms, "decided", lambda flags: None)  # as on a device: whose values they are, is a flag there
    model, other, writer, criterion = nn.Linear(4, 1), nn.Linear(4, 1), MemoryWriter(), nn.GaussianNLLLoss()
    x, y, variance = torch.randn(50, 4), torch.randn(50, 1), torch.rand(50, 1) + 0.1
    with watch(model, writer):
        out = model(x)
        criterion(out.clone() if judges_it else other(x) + 0 * out, y, variance).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    found = [value for _, value in writer.scalars("uncertainty_total/root")]
    assert found == ([pytest.approx(variance.mean().item())] if judges_it else [])
    assert len(writer.scalars("calibration/coverage_50")) == judges_it


def by_softplus(x, y):
    return (F.softplus(x) - y * x).mean()


def by_poisson(x, y):
    return F.poisson_nll_loss(x, y)


def by_rate(x, y):
    return F.poisson_nll_loss(x.exp(), y, log_input=False)


@pytest.mark.parametrize(
    ("loss", "is_one"),
    [(F.binary_cross_entropy_with_logits, True), (by_softplus, True), (by_poisson, False), (by_rate, False)],
)
@pytest.mark.parametrize("level", [-8.0, -7.0, -5.0])
def test_counts_are_no_classes_however_small_their_rates(level, loss, is_one):
    torch.manual_seed(0)
    model, writer = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)), MemoryWriter()
    with torch.no_grad():
        model[2].bias.fill_(level)
        model[2].weight.mul_(2)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    with torchprobe.instrument(model, writer=writer, every=1):
        for _ in range(4):
            x, y = torch.randn(256, 4), (torch.rand(256, 1) < 0.1).float()
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
    assert ("calibration/ece" in writer.tags()) == is_one
