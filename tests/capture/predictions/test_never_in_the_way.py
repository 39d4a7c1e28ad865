"""The laws of the package, for everything that looks at predictions."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as registry

import torchprobe
from tests.modes import NoHostRead
from torchprobe.capture.predictions import capture, forms
from torchprobe.testing import MemoryWriter


class Ensemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 3)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([member(x) for member in self.members]).mean(0)


def watch(model: nn.Module, writer: MemoryWriter, every: int = 1) -> torchprobe.Session:
    probes = [torchprobe.Uncertainty(), torchprobe.Calibration()]
    return torchprobe.instrument(model, writer=writer, probes=probes, every=every)


def train(probed: bool, kind: str):
    torch.manual_seed(0)
    model = Ensemble()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    session = watch(model, MemoryWriter()) if probed else None
    criterion, validations = nn.CrossEntropyLoss(), []
    for _ in range(4):
        x, y = torch.randn(12, 4), torch.randint(0, 3, (12,))
        for _ in range(3):
            loss = criterion(model(x), y) if kind == "module" else F.cross_entropy(model(x), y)
            (loss / 3).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            validations.append(criterion(model(x), y))
        model.train()
        if session is not None:
            session.log_predictions(torch.rand(4, 3).softmax(-1), torch.zeros(4, dtype=torch.long))
        else:
            torch.rand(4, 3)
    if session is not None:
        session.detach()
    return copy.deepcopy(model.state_dict()), torch.get_rng_state(), torch.stack(validations)


@pytest.mark.parametrize("kind", ["module", "functional"])
def test_training_is_bitwise_the_same(kind):
    (weights, state, losses), (seen, state_seen, losses_seen) = train(False, kind), train(True, kind)
    assert all(torch.equal(weights[name], seen[name]) for name in weights)
    assert torch.equal(state, state_seen)
    assert torch.equal(losses, losses_seen)


def test_no_output_outlives_its_step_and_no_hook_its_pass(traces):
    model, writer = Ensemble(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, writer):
        before = set(traces(model))
        for training in (True, False, True):
            with torch.set_grad_enabled(training):
                model.train(training)
                out = model(torch.randn(12, 4))
                if training:
                    F.cross_entropy(out, torch.randint(0, 3, (12,))).backward()
                    optimizer.step()
                    assert not registry._global_forward_hooks
            gone = weakref.ref(out)
            del out
            gc.collect()
            assert gone() is None
            assert set(traces(model)) <= before


def test_a_pass_that_raises_leaves_no_hook(traces):
    class Breaks(Ensemble):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("the user's own")

    model = Breaks()
    with watch(model, MemoryWriter()):
        before = traces(model)
        with pytest.raises(RuntimeError, match="user's own"):
            model(torch.randn(3, 4))
        assert traces(model) == before


def test_nothing_is_read_from_the_device():
    model = Ensemble()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.CrossEntropyLoss()
    with watch(model, MemoryWriter()) as session, NoHostRead():
        for loss in (F.cross_entropy, criterion):
            x, y = torch.randn(12, 4), torch.randint(0, 3, (12,))
            loss(model(x), y).backward()
            optimizer.step()
            with torch.no_grad():
                criterion(model.eval()(x), y)
            session.log_predictions(torch.rand(4, 3).softmax(-1), torch.zeros(4, dtype=torch.long))
            model.train()


def test_of_a_large_output_a_sample_of_rows_is_read(monkeypatch):
    monkeypatch.setattr(forms, "MAX_ELEMENTS", 40 * 11)
    model, writer = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11)), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.randint(0, 11, (20, 30))
    with watch(model, writer):
        out = model(ids)
        F.cross_entropy(out.flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
    exact = torch.special.entr(out.softmax(-1)).sum(-1).mean().item()
    assert writer.value("calibration/count") == 40
    assert writer.value("uncertainty_total/root") == pytest.approx(exact, rel=0.05)
    assert "sample" in writer.records[-1].descriptions["uncertainty_total"]
    assert "sample" in writer.records[-1].descriptions["calibration"]


def test_a_failure_is_logged_once_and_training_goes_on(caplog, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("our own bug")

    monkeypatch.setattr(capture, "confirm_gradient", broken)
    model = Ensemble()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, MemoryWriter()) as session:
        for _ in range(3):
            F.cross_entropy(model(torch.randn(12, 4)), torch.randint(0, 3, (12,))).backward()
            optimizer.step()
        assert session.step == 3
    assert sum("is switched off" in record.getMessage() for record in caplog.records) == 1


def test_an_idle_step_looks_at_no_output(monkeypatch):
    model = Ensemble()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, MemoryWriter(), every=100):
        for step in range(3):
            if step == 1:
                monkeypatch.setattr(capture.PredictionCapture, "on_output", lambda *_: pytest.fail("looked"))
            F.cross_entropy(model(torch.randn(12, 4)), torch.randint(0, 3, (12,))).backward()
            assert not registry._global_forward_hooks
            optimizer.step()


class Scripted(torch.jit.ScriptModule):
    """Of a class of torch.jit's, which does not show its `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    @torch.jit.script_method
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x))


@pytest.mark.parametrize("called", ["itself", "by parts"])
def test_a_part_that_is_a_script_is_left_as_it_is(called):
    def run(probed: bool):
        torch.manual_seed(0)
        parts, writer = [Scripted(), nn.Linear(4, 3)], MemoryWriter()
        model = nn.ModuleList(parts) if called == "by parts" else nn.Sequential(*parts)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        session = torchprobe.instrument(model, writer=writer, every=1) if probed else None
        losses = []
        for _ in range(3):
            z = torch.randn(6, 4)
            z = model[1](model[0](z)) if called == "by parts" else model(z)
            loss = F.cross_entropy(z, torch.randint(0, 3, (6,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if session is not None:
            session.detach()
            assert [value for _, value in writer.scalars("overview/loss")] == pytest.approx(losses)
        return list(model.state_dict().values())

    assert all(map(torch.equal, run(False), run(True)))
