"""Validation of several data sets: apart where the program's lines tell them apart, else together, which is said."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchprobe
from torchprobe.testing import MemoryWriter

CE = nn.CrossEntropyLoss()
Batches = list[tuple[Tensor, Tensor]]


def batches(seed: int, count: int, size: int = 16) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(count, 6, generator=generator), torch.randint(0, 5, (count,), generator=generator)
    return list(zip(x.split(size), y.split(size), strict=True))


def evaluate(model: nn.Module, data: Batches) -> None:
    for x, y in data:
        CE(model(x), y)


def by_a_function(model: nn.Module, one: Batches, other: Batches) -> None:
    evaluate(model, one)
    evaluate(model, other)


def written_out(model: nn.Module, one: Batches, other: Batches) -> None:
    for x, y in one:
        CE(model(x), y)
    for x, y in other:
        CE(model(x), y)


def in_a_loop(model: nn.Module, one: Batches, other: Batches) -> None:
    for data in (one, other, one):
        evaluate(model, data)


def two_calls_a_batch(model: nn.Module, one: Batches, other: Batches) -> None:
    for x, y in one:
        CE(model(x), y)
        CE(model(x + 1), y)


class Seen:
    def __init__(self, validate: Callable[[nn.Module, Batches, Batches], None], one: int = 48, other: int = 30) -> None:
        torch.manual_seed(0)
        self.model, self.writer = nn.Linear(6, 5), MemoryWriter()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.one, self.other = batches(1, one), batches(2, other)
        with torchprobe.instrument(self.model, writer=self.writer, every=1, rules=[]) as session:
            for _ in range(2):
                F.cross_entropy(self.model.train()(self.one[0][0].clone()), self.one[0][1]).backward()
                optimizer.step()
                optimizer.zero_grad()
                with torch.no_grad():
                    validate(self.model.eval(), self.one, self.other)
        self.lines = [line for line in session.summary().splitlines() if "validation: " in line]

    def are_of(self, data: Batches, name: str = "") -> None:
        x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
        p = self.model(x).detach().double().softmax(-1)
        tag = "val/calibration/{}" + (f"/{name}" if name else "")
        assert self.writer.value(tag.format("count")) == len(y)
        assert self.writer.value(tag.format("accuracy")) == pytest.approx((p.argmax(-1) == y).double().mean().item())
        nll = -p.gather(-1, y[:, None]).log().mean().item()
        assert self.writer.value(tag.format("nll")) == pytest.approx(nll, rel=1e-5)
        where = "root" + (f".{name}" if name else "")
        entropy = torch.special.entr(p).sum(-1).mean().item()
        assert self.writer.value(f"val/uncertainty_total/{where}") == pytest.approx(entropy, rel=1e-5)

    @property
    def loops(self) -> list[str]:
        return [tag for tag in self.writer.tags() if "loop_" in tag]


@pytest.mark.parametrize("validate", [by_a_function, written_out])
def test_loops_at_places_of_their_own_are_apart_and_together(validate):
    got = Seen(validate)
    got.are_of(got.one, "loop_1")
    got.are_of(got.other, "loop_2")
    got.are_of(got.one + got.other)
    (line,) = got.lines
    assert "loop_1 test_validation_loops.py:" in line


def test_data_sets_that_nothing_tells_apart_are_together_which_is_said():
    got = Seen(in_a_loop)
    got.are_of(got.one + got.other + got.one)
    assert got.loops == []
    (line,) = got.lines
    assert "a batch of 16 came after one of 14" in line


def loaded(*sizes: int) -> list[DataLoader[tuple[Tensor, ...]]]:
    sets = [TensorDataset(*(torch.cat(column) for column in zip(*batches(9, size), strict=True))) for size in sizes]
    return [DataLoader(data, 8) for data in sets]


@pytest.mark.parametrize(("sizes", "said"), [((16, 24), True), ((40,), False)])
def test_full_batches_of_several_loaders_are_told_by_where_they_begin(sizes, said):
    got = Seen(lambda model, *_: [evaluate(model, loader) for loader in loaded(*sizes)])
    assert got.loops == []
    assert any("as where a DataLoader begins" in line for line in got.lines) is said


def test_one_data_set_is_one():
    got = Seen(lambda model, one, other: evaluate(model, other))
    got.are_of(got.other)
    assert (got.loops, got.lines) == ([], [])


def test_two_calls_a_batch_are_one_loop():
    got = Seen(two_calls_a_batch)
    got.are_of([pair for x, y in got.one for pair in ((x, y), (x + 1, y))])
    assert (got.loops, got.lines) == ([], [])


def test_passes_at_two_places_over_one_input_are_members():
    torch.manual_seed(0)
    model, writer = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 5)), MemoryWriter()
    optimizer, (x, y), seen = torch.optim.SGD(model.parameters(), lr=0.0), batches(1, 16)[0], []
    with torchprobe.instrument(model, writer=writer, every=1, rules=[]):
        F.cross_entropy(model(x.clone()), y).backward()
        optimizer.step()
        with torch.no_grad():
            for batch, _ in batches(2, 48):
                first = model(batch)
                second = model(batch)
                seen.append(torch.stack((first, second)))
    p = torch.cat(seen, 1).double().softmax(-1)
    epistemic = torch.special.entr(p.mean(0)).sum(-1).mean() - torch.special.entr(p).sum(-1).mean()
    assert writer.value("val/uncertainty_epistemic/root") == pytest.approx(epistemic.item(), rel=1e-3)
    assert [tag for tag in writer.tags() if "loop_" in tag] == []


def words() -> Tensor:
    return torch.randint(0, 9, (6, 8), generator=torch.Generator().manual_seed(3))


SHIFTED = {
    "flat": (lambda z: CE(z[:, :-1].reshape(-1, 9), words()[:, 1:].reshape(-1)), False),
    "classes second": (lambda z: CE(z[:, :-1].transpose(1, 2), words()[:, 1:]), False),
    "of the word before": (lambda z: CE(z[:, 1:].reshape(-1, 9), words()[:, :-1].reshape(-1)), True),
}


def language_model(loss: Callable[[Tensor], Tensor]) -> tuple[nn.Module, MemoryWriter]:
    torch.manual_seed(0)
    model, writer = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9)), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torchprobe.instrument(model, writer=writer, every=1, rules=[]):
        F.cross_entropy(model(words())[:, :-1].flatten(0, 1), words()[:, 1:].flatten()).backward()
        optimizer.step()
        with torch.no_grad():
            loss(model.eval()(words()))
    return model, writer


@pytest.mark.parametrize(("loss", "reverse"), SHIFTED.values(), ids=SHIFTED)
def test_a_shifted_loss_module_tells_of_a_language_model(loss, reverse):
    model, writer = language_model(loss)
    z = model(words()).detach().double()
    z, y = (z[:, 1:], words()[:, :-1]) if reverse else (z[:, :-1], words()[:, 1:])
    assert writer.value("val/calibration/count") == y.numel()
    assert writer.value("val/calibration/accuracy") == pytest.approx((z.argmax(-1) == y).double().mean().item())
    nll = F.cross_entropy(z.flatten(0, 1), y.flatten()).item()
    assert writer.value("val/calibration/nll") == pytest.approx(nll, rel=1e-5)


def test_the_last_word_alone_may_be_judged():
    model, writer = language_model(lambda z: CE(z[:, -1], words()[:, 0]))
    z = model(words()).detach()[:, -1]
    assert writer.value("val/calibration/count") == 6
    assert writer.value("val/calibration/nll") == pytest.approx(F.cross_entropy(z, words()[:, 0]).item(), rel=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: CE(2 * z[:, :-1].reshape(-1, 9), words()[:, 1:].reshape(-1)),
        lambda z: CE(z[:, :-1].flip(1).reshape(-1, 9), words()[:, 1:].reshape(-1)),
        lambda z: CE(z[:, ::2].repeat(1, 2, 1)[:, :7].reshape(-1, 9), words()[:, 1:].reshape(-1)),
    ],
)
def test_other_values_than_those_of_the_output_tell_nothing(loss):
    _, writer = language_model(loss)
    assert [tag for tag in writer.tags() if tag.startswith("val/calibration")] == []


@pytest.mark.parametrize("classes", [True, False])
def test_that_a_functional_loss_tells_no_targets_in_validation_is_said_of_classes_alone(classes):
    model, data = nn.Linear(6, 5), batches(3, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1, rules=[]) as session:
        for _ in range(2):
            for x, y in data:
                optimizer.zero_grad()
                (F.cross_entropy(model(x), y) if classes else F.mse_loss(model(x), F.one_hot(y, 5).float())).backward()
                optimizer.step()
            with torch.no_grad():
                for x, y in data:
                    F.cross_entropy(model(x), y)
    assert session.summary().count("calibration in validation: no targets were seen") == classes
