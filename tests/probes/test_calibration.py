"""Calibration in a loop that nothing was added to, against the same computed from predictions that were kept."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchprobe
from tests.probes.calibrated import assert_calibration, batch, net, watch
from torchprobe.testing import MemoryWriter


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_micro_batches_add_up_and_validation_in_between_stays_apart():
    model, writer = net(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.CrossEntropyLoss()
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "val": []}
    with watch(model, writer):
        for step in range(2):
            kept["train"].clear()
            for part in range(3):
                x, y = batch(10 * step + part, 8 + part)
                out = model(x)
                kept["train"].append((out.softmax(-1), y))
                (F.cross_entropy(out, y) / 3).backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            kept["val"].clear()
            with torch.no_grad():
                for part in range(4):
                    x, y = batch(100 * (step + 1) + part, 6)
                    out = model(x)
                    kept["val"].append((out.softmax(-1), y))
                    criterion(out, y)
            model.train()
    for phase, prefix in (("train", ""), ("val", "val/")):
        p, y = (torch.cat(column) for column in zip(*kept[phase], strict=True))
        assert_calibration(writer, 2, p, y, prefix)


def test_training_is_of_the_sampled_step_alone_whatever_the_flushes():
    model, writer = net(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, writer, flush_every=3):
        for step in range(6):
            x, y = batch(step, 10)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert writer.scalars("calibration/count") == [(step, 10) for step in range(1, 7)]


def test_validation_with_a_functional_loss_says_once_what_to_do(caplog):
    model, writer = net(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, writer), caplog.at_level(logging.WARNING, "torchprobe"):
        for step in range(3):
            x, y = batch(step)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            with torch.no_grad():
                F.cross_entropy(model.eval()(x), y)
            model.train()
    told = [r for r in caplog.records if "log_predictions" in r.getMessage()]
    assert len(told) == 1
    assert "val/calibration/ece" not in writer.tags()
    assert "val/uncertainty_total/root" in writer.tags()


@pytest.mark.parametrize("mixed", [True, False])
def test_validation_that_is_judged_does_not_hide_that_training_is_not(mixed, caplog):
    model, writer, loss, (x, y) = net(), MemoryWriter(), nn.CrossEntropyLoss(), batch(0)
    with watch(model, writer) as session:
        for _ in range(2):
            out = model(x)
            (loss(out, y) + mixed * out.square().mean()).backward()
            session.next_step()
            with torch.no_grad():
                loss(model.eval()(x), y)
            model.train()
    assert bool(writer.scalars("calibration/nll")) is not mixed
    assert writer.scalars("val/calibration/nll")
    assert caplog.text.count("calibration in training: no targets were seen") == mixed


def test_a_model_that_a_reentrant_checkpoint_runs_again_in_backward():
    model, writer = net(), MemoryWriter()
    x, y = batch(0)
    with watch(model, writer):
        out = checkpoint(model, x.requires_grad_(), use_reentrant=True)
        F.cross_entropy(out, y).backward()
        sgd(model).step()
    assert_calibration(writer, 1, out.softmax(-1), y)


def test_the_loss_of_another_model_in_validation_is_not_taken():
    model, teacher, writer = net(), net(), MemoryWriter()
    criterion = nn.CrossEntropyLoss()
    x, y = batch(0)
    with watch(model, writer):
        F.cross_entropy(model(x), y).backward()
        sgd(model).step()
        with torch.no_grad():
            out = model.eval()(x)
            criterion(teacher(x), y)
            criterion(out.double(), y)
    assert_calibration(writer, 1, out.softmax(-1), y, "val/")


class Labelled(nn.Module):
    """Computes its own loss, as HuggingFace's models do."""

    def __init__(self, shift: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11))
        self.shift = shift

    def forward(self, ids: Tensor, labels: Tensor | None = None):
        logits = self.net(ids)
        p, y = (logits[:, :-1], labels[:, 1:]) if self.shift else (logits, labels)
        return {"loss": F.cross_entropy(p.flatten(0, 1), y.flatten()), "logits": logits}


class TinyLMHeadModel(Labelled):
    """The name says that labels are shifted."""


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("kind", [Labelled, TinyLMHeadModel])
def test_labels_that_the_model_is_called_with(kind, by_name):
    shift = kind is TinyLMHeadModel
    model, writer = kind(shift), MemoryWriter()
    ids, labels = torch.randint(0, 11, (4, 9)), torch.randint(0, 11, (4, 9))
    labels[0, :3] = -100
    with watch(model, writer):
        out = model(ids, labels=labels) if by_name else model(ids, labels)
        out["loss"].backward()
        sgd(model).step()
        with torch.no_grad():
            later = model.eval()(ids, labels=labels)
    p, q, y = out["logits"].softmax(-1), later["logits"].softmax(-1), labels
    if shift:
        p, q, y = p[:, :-1], q[:, :-1], y[:, 1:]
    kept = y >= 0
    assert_calibration(writer, 1, p[kept], y[kept])
    assert_calibration(writer, 1, q[kept], y[kept], "val/")


# ---- the generalisation gap


@pytest.mark.parametrize("handed_in", [False, True])
def test_the_gap_is_of_a_validation_and_the_sampled_step_before_it(handed_in):
    model, writer, criterion = net(), MemoryWriter(), nn.CrossEntropyLoss()
    expected = []
    with watch(model, writer) as session:
        for step in range(2):
            kept = []
            for seed in (step, 10 + step):
                x, y = batch(seed)
                training = seed == step
                with torch.set_grad_enabled(training):
                    out = model.train(training)(x)
                    loss = criterion(out, y)
                if training:
                    loss.backward()
                if handed_in:
                    session.log_predictions(out.softmax(-1), y)
                if training:
                    sgd(model).step()
                kept.append((loss.item(), (out.argmax(-1) == y).float().mean().item()))
            expected.append([val - train for train, val in zip(*kept, strict=True)])
    for i, tag in enumerate(("overview/generalisation_gap_nll", "overview/generalisation_gap_accuracy")):
        got = [value for _, value in writer.scalars(tag)]
        assert got == pytest.approx([gap[i] for gap in expected], abs=1e-5)
    assert not any("val/overview/generalisation" in tag for tag in writer.tags())


# ---- handed in


def test_predictions_that_are_handed_in_count_at_every_call_and_replace_what_was_found():
    model, writer = net(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = torch.rand(20, 5).softmax(-1), torch.randint(0, 5, (20,))
    with watch(model, writer, every=100) as session:
        for step in range(3):
            x, y = batch(step)
            F.cross_entropy(model(x), y).backward()
            session.log_predictions(other[0][:12], other[1][:12])
            optimizer.step()
            session.log_predictions(other[0][12:].numpy(), other[1][12:].numpy())
            with torch.no_grad():
                model.eval()(x)
            session.log_predictions(*other)
            model.train()
    assert_calibration(writer, 1, *other)
    assert writer.scalars("calibration/count") == [(1, 20), (2, 20), (3, 20)]
    assert writer.scalars("val/calibration/count") == [(1, 20), (2, 20), (3, 20)]


class Pairs(nn.Module):
    """Skip-gram with negative sampling: scores of pairs from the corpus, and of pairs that were drawn."""

    def __init__(self):
        super().__init__()
        self.centre, self.context = (nn.Embedding.from_pretrained(torch.randn(50, 8), False) for _ in range(2))

    def forward(self, centre, context, drawn):
        v = self.centre(centre)
        return (v * self.context(context)).sum(-1), (self.context(drawn) * v[:, None]).sum(-1)


@pytest.mark.parametrize("both", [False, True])
def test_positives_alone_are_judged_and_raise_no_alarm(both):
    model, writer = Pairs(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    rule = torchprobe.Overconfidence(untrained=2, gap=0.01, ece=0.01, predictions=64)
    with watch(model, writer, rules=[rule]) as session:
        for _ in range(6):
            centre, context = torch.randint(0, 50, (2, 64))
            found, drawn = model(centre, context, torch.randint(0, 50, (64, 5)))
            y = torch.ones(64)
            y[: 16 * both] = 0.0
            loss = F.binary_cross_entropy_with_logits(found, y) - F.logsigmoid(-drawn).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        session.flush()
        assert [alert.rule for alert in session.alerts] == ["overconfidence"] * both
    accuracy = ((found > 0) == (y > 0.5)).float().mean().item()
    assert writer.value("calibration/accuracy") == pytest.approx(accuracy)
    confidence = torch.maximum(found.sigmoid(), 1 - found.sigmoid()).mean().item()
    assert writer.value("calibration/confidence_gap") == pytest.approx(confidence - accuracy, abs=1e-5)


def test_logits_that_are_handed_in_are_left_out_with_a_warning(caplog):
    model, writer = net(), MemoryWriter()
    with watch(model, writer) as session:
        session.log_predictions(torch.tensor([[2.0, -1.0], [0.25, 0.75]]), torch.tensor([0, 1]))
        session.next_step()
    assert writer.value("calibration/invalid") == 1
    assert writer.value("calibration/count") == 1
    assert sum("not logits" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("probs", "targets", "error", "words"),
    [
        ([0.5, 0.5], torch.tensor(1), TypeError, r"probs=\[0.5, 0.5\].*tensor"),
        (torch.rand(3, 5), None, TypeError, "targets=None"),
        (torch.ones(3, 5, dtype=torch.int64), torch.zeros(3), TypeError, "probs: got torch.int64"),
        (torch.rand(3, 5), torch.zeros(4), ValueError, r"targets: got shape \(4,\) for probs of shape \(3, 5\)"),
        (np.array(["a"]), np.zeros(1), TypeError, "probs="),
    ],
)
def test_what_is_no_prediction_is_refused_at_the_call(probs, targets, error, words):
    with watch(net(), MemoryWriter()) as session, pytest.raises(error, match=words):
        session.log_predictions(probs, targets)


# ---- regression


class Gaussian(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mean, log_var = self.fc(x).unbind(-1)
        return {"mean": mean, "variance": log_var.exp()}


@pytest.mark.parametrize("kind", ["gaussian_nll", "mse"])
@pytest.mark.parametrize("training", [True, False])
def test_coverage_of_intervals(kind, training):
    model, writer = Gaussian(), MemoryWriter()
    squared_error, likelihood = nn.MSELoss(), nn.GaussianNLLLoss()
    x, y = torch.randn(400, 4), torch.randn(400)
    with watch(model, writer):
        model(x)["mean"].sum().backward()
        sgd(model).step()
        with torch.set_grad_enabled(training):
            out = model.train(training)(x)
            loss = squared_error(out["mean"], y) if kind == "mse" else likelihood(out["mean"], y, out["variance"])
        if training:
            loss.backward()
            sgd(model).step()
    std = out["variance"].sqrt()
    prefix, step = ("", 2) if training else ("val/", 1)
    for level, width in (("50", 0.6744898), ("90", 1.6448536)):
        expected = ((y - out["mean"]).abs() <= width * std).float().mean().item()
        assert writer.value(f"{prefix}calibration/coverage_{level}", step) == pytest.approx(expected)
    assert writer.histograms(f"{prefix}calibration_pit/targets")[-1][1].counts.sum() == 400


# ---- pictures


def test_pictures_come_with_the_first_and_every_tenth_sampled_step_and_with_validation():
    model, writer = net(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.CrossEntropyLoss()
    with watch(model, writer):
        for step in range(12):
            x, y = batch(step)
            criterion(model(x), y).backward()
            optimizer.step()
            if step == 4:
                with torch.no_grad():
                    criterion(model.eval()(x), y)
                model.train()
    for name in ("calibration_reliability/predictions", "calibration_risk_coverage/predictions"):
        assert [r.step for r in writer.records if name in r.values] == [1, 11]
        assert [r.step for r in writer.records if f"val/{name}" in r.values] == [5]
        assert writer.value(name).pixels.shape[1] <= 320


@pytest.mark.parametrize("by_hand", [False, True])
def test_advice_about_a_call_stands_only_where_it_was_made(by_hand, caplog):
    """A batch with NaN: its row is counted and said, and nobody is told what a call takes that he did not make."""
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1) as session:
        for step in range(8):
            x = torch.randn(64, 8)
            y = x[:, :4].argmax(1)
            x[0, 0] = float("nan") if step == 4 else 0.0
            logits = model(x)
            if by_hand:
                session.log_predictions(logits.detach().softmax(-1), y)
            criterion(logits, y).backward()
            optimizer.step()
            optimizer.zero_grad()
    lines = [record.getMessage() for record in caplog.records if "no probabilities" in record.getMessage()]
    assert ["log_predictions takes" in line for line in lines] == [by_hand]
