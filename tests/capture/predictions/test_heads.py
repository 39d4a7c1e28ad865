"""Several outputs of one model: each is judged by its own loss, under its own name; of another that is said."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchprobe
from torchprobe.testing import MemoryWriter

OF_MODULE = nn.CrossEntropyLoss()


class Heads(nn.Module):
    def __init__(self, kind: str, rate: float = 0.0) -> None:
        super().__init__()
        self.body, self.colour, self.shape = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 5)
        self.drop, self.kind = nn.Dropout(rate), kind

    def forward(self, x: Tensor) -> Any:
        hidden = self.drop(self.body(x).relu())
        heads = self.colour(hidden), self.shape(hidden)
        return {
            "tuple": heads,
            "list": list(heads),
            "dict": dict(zip(("colour", "shape"), heads, strict=True)),
            "logits": dict(zip(("logits", "aux_logits"), heads, strict=True)),
            "beside weights": (heads[0], hidden.detach()),
            "one": heads[0],
        }[self.kind]


SECOND = {"tuple": "1", "list": "1", "dict": "shape", "logits": "aux_logits"}


class Seen(NamedTuple):
    values: dict[str, float]
    parts: list[Tensor]
    colours: Tensor
    shapes: Tensor
    lines: list[str]

    def are_of(self, z: Tensor, y: Tensor, calibration: str, uncertainty: str, prefix: str = "") -> None:
        """Numbers worked out apart."""
        p = z.double().softmax(-1)
        expected = {
            f"{prefix}calibration/accuracy{calibration}": (p.argmax(-1) == y).double().mean().item(),
            f"{prefix}calibration/nll{calibration}": -p.gather(-1, y[:, None]).log().mean().item(),
            f"{prefix}uncertainty_total/root{uncertainty}": torch.special.entr(p).sum(-1).mean().item(),
        }
        assert {tag: self.values.get(tag, -1.0) for tag in expected} == pytest.approx(expected, rel=1e-4)


def parts_of(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return list(output.values()) if isinstance(output, dict) else list(output)


def run(
    kind: str,
    caplog: pytest.LogCaptureFixture,
    first: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    second: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Seen:
    torch.manual_seed(1)
    model, writer = Heads(kind), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x, colours, shapes = torch.randn(48, 6), torch.randint(4, (48,)), torch.randint(5, (48,))
    with caplog.at_level(logging.WARNING), torchprobe.instrument(model, writer=writer, every=1, rules=[]):
        for _ in range(2):
            parts = parts_of(model(x))
            loss = first(parts[0], colours)
            if len(parts) > 1 and parts[1].requires_grad:
                loss = loss + second(parts[1], shapes)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for part, y in zip(parts_of(model.eval()(x)), (colours, shapes), strict=False):
                    OF_MODULE(part, y) if part.shape[1] < 6 else None
            model.train()
    values = {tag: writer.value(tag) for tag in writer.tags() if writer.scalars(tag)}
    lines = [r.getMessage() for r in caplog.records if "several outputs" in r.getMessage()]
    return Seen(values, [part.detach() for part in parts], colours, shapes, lines)


@pytest.mark.parametrize("kind", SECOND)
@pytest.mark.parametrize("second", [F.cross_entropy, OF_MODULE, lambda z, y: 0.3 * F.cross_entropy(z, y)])
def test_each_head_is_judged_under_its_own_name(kind, second, caplog):
    got = run(kind, caplog, second=copy.deepcopy(second))
    for prefix in ("", "val/"):
        got.are_of(got.parts[0], got.colours, "", "", prefix)
        got.are_of(got.parts[1], got.shapes, f"/{SECOND[kind]}", f".{SECOND[kind]}", prefix)
    assert got.lines == []


@pytest.mark.parametrize("kind", SECOND)
def test_of_a_head_with_a_loss_of_another_kind_nothing_is_claimed(kind, caplog):
    got = run(kind, caplog, second=lambda z, y: F.mse_loss(z, F.one_hot(y, 5).float()))
    got.are_of(got.parts[0], got.colours, "", "")
    own = (f"/{SECOND[kind]}", f".{SECOND[kind]}")
    of_head = [tag for tag in got.values if tag.startswith(("calibration/", "uncertainty_")) and tag.endswith(own)]
    assert of_head == []


def test_a_head_beside_one_that_is_not_known(caplog):
    got = run("dict", caplog, first=lambda z, y: z.square().mean())
    got.are_of(got.parts[1], got.shapes, "/shape", ".shape")
    assert "calibration/accuracy" not in got.values


def test_of_a_head_that_no_loss_tells_of_there_is_one_line(caplog):
    torch.manual_seed(1)
    model, writer = Heads("dict"), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x, colours = torch.randn(48, 6), torch.randint(4, (48,))
    with caplog.at_level(logging.WARNING), torchprobe.instrument(model, writer=writer, every=1, rules=[]):
        for _ in range(3):
            output = model(x)
            (F.cross_entropy(output["colour"], colours) + output["shape"].square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
    (line,) = [r.getMessage() for r in caplog.records if "several outputs" in r.getMessage()]
    assert "(colour, shape)" in line
    assert "but of colour;" in line


@pytest.mark.parametrize("kind", ["one", "beside weights"])
def test_what_is_not_trained_is_no_head(kind, caplog):
    assert run(kind, caplog).lines == []


def test_passes_of_dropout_are_members_of_each_head(caplog):
    torch.manual_seed(1)
    model, writer = Heads("tuple", 0.5), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x, y = torch.randn(48, 6), (torch.randint(4, (48,)), torch.randint(5, (48,)))
    with torchprobe.instrument(model, writer=writer, every=1, rules=[]):
        outputs = [model(x) for _ in range(4)]
        sum(F.cross_entropy(z, t) for pair in outputs for z, t in zip(pair, y, strict=True)).backward()
        optimizer.step()
    for part, name in ((0, "root"), (1, "root.1")):
        p = torch.stack([pair[part].detach().double().softmax(-1) for pair in outputs])
        total, aleatoric = torch.special.entr(p.mean(0)).sum(-1).mean(), torch.special.entr(p).sum(-1).mean()
        assert writer.value(f"uncertainty_epistemic/{name}") == pytest.approx((total - aleatoric).item(), rel=1e-3)


def test_a_returned_loss_tells_of_each_head():
    class Own(Heads):
        def forward(self, x, colours, shapes):
            a, b = super().forward(x)
            return F.cross_entropy(a, colours) + F.cross_entropy(b, shapes), a, b

    torch.manual_seed(1)
    model, writer = Own("tuple"), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x, colours, shapes = torch.randn(48, 6), torch.randint(4, (48,)), torch.randint(5, (48,))
    with torchprobe.instrument(model, writer=writer, every=1, rules=[]):
        loss, a, b = model(x, colours, shapes)
        loss.backward()
        optimizer.step()
    assert writer.value("calibration/accuracy") == pytest.approx((a.argmax(-1) == colours).double().mean().item())
    assert writer.value("calibration/accuracy/2") == pytest.approx((b.argmax(-1) == shapes).double().mean().item())
