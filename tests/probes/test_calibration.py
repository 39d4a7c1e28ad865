"""Calibration in a loop that nothing was added to, against the same computed from predictions that were kept."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchprobe
from torchprobe.statistics import calibration
from torchprobe.testing import MemoryWriter

KEYS = ("ece", "mce", "adaptive_ece", "brier", "nll", "accuracy", "confidence", "confidence_gap")


def net(inputs: int = 4, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, classes))


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def batch(seed: int, size: int = 32, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=generator), torch.randint(0, classes, (size,), generator=generator)


def offline(p: Tensor, y: Tensor) -> dict[str, float]:
    return calibration.summarise(calibration.compute(p.detach().float(), y).tolist())


def assert_calibration(writer: MemoryWriter, step: int, p: Tensor, y: Tensor, prefix: str = "", rel=1e-5) -> None:
    expected = offline(p, y)
    assert writer.value(f"{prefix}calibration/count", step) == expected["count"]
    for key in KEYS:
        assert writer.value(f"{prefix}calibration/{key}", step) == pytest.approx(expected[key], rel=rel, abs=1e-6), key
    assert writer.value(f"{prefix}overview/ece", step) == writer.value(f"{prefix}calibration/ece", step)


def watch(model: nn.Module, writer: MemoryWriter, **options) -> torchprobe.Session:
    probes = [torchprobe.Uncertainty(), torchprobe.Calibration()]
    return torchprobe.instrument(model, writer=writer, **{"probes": probes, "every": 1, **options})


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
        assert_calibration(writer, step, torch.cat(p[:step]), torch.cat(y[:step]))


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


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), F.cross_entropy], ids=["module", "functional"])
def test_classes_in_the_second_dimension(loss):
    model, writer = nn.Conv2d(1, 5, 3), MemoryWriter()
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


def test_micro_batches_add_up_and_validation_in_between_stays_apart():
    model, writer = net(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.CrossEntropyLoss()
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "val": []}
    with watch(model, writer):
        for step in range(2):
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


def test_training_adds_up_since_the_last_flush():
    model, writer = net(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, writer, flush_every=3):
        for step in range(6):
            x, y = batch(step, 10)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert writer.scalars("calibration/count") == [(1, 10), (2, 20), (3, 10), (4, 20), (5, 30), (6, 10)]


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
    assert writer.scalars("calibration/count") == [(1, 20), (2, 40), (3, 60)]
    assert writer.scalars("val/calibration/count") == [(1, 20), (2, 20), (3, 20)]


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
        return {"mean": mean, "log_var": log_var}


@pytest.mark.parametrize("kind", ["gaussian_nll", "mse"])
@pytest.mark.parametrize("training", [True, False])
def test_coverage_of_intervals(kind, training):
    model, writer = Gaussian(), MemoryWriter()
    x, y = torch.randn(400, 4), torch.randn(400)
    with watch(model, writer):
        model(x)["mean"].sum().backward()
        sgd(model).step()
        with torch.set_grad_enabled(training):
            out = model.train(training)(x)
            if kind == "mse":
                loss = nn.MSELoss()(out["mean"], y)
            else:
                loss = nn.GaussianNLLLoss()(out["mean"], y, out["log_var"].exp())
        if training:
            loss.backward()
            sgd(model).step()
    std = (out["log_var"] / 2).exp()
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
