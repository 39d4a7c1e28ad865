"""What an optimizer keeps, and how far it steps, by module: against the optimizer's own state in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchprobe
from torchprobe.testing import MemoryWriter

OPTIMIZERS = {
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.1), None, None),
    "SGD with momentum": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "momentum_buffer", None),
    "Adam, one by one": (lambda p: torch.optim.Adam(p, lr=0.1, foreach=False), "exp_avg", "exp_avg_sq"),
    "AdamW, foreach": (lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True), "exp_avg", "exp_avg_sq"),
    "AdamW, fused": (lambda p: torch.optim.AdamW(p, lr=0.1, fused=True), "exp_avg", "exp_avg_sq"),
    "Adam with amsgrad": (lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True), "exp_avg", "exp_avg_sq"),
    "NAdam": (lambda p: torch.optim.NAdam(p, lr=0.1), "exp_avg", "exp_avg_sq"),
    "RAdam": (lambda p: torch.optim.RAdam(p, lr=0.1), "exp_avg", "exp_avg_sq"),
    "Adamax": (lambda p: torch.optim.Adamax(p, lr=0.1), "exp_avg", None),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, lr=0.1), None, "square_avg"),
    "RMSprop, centred": (
        lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
        "momentum_buffer",
        "square_avg",
    ),
    "Adadelta": (lambda p: torch.optim.Adadelta(p, lr=0.1), None, "square_avg"),
    "Adagrad": (lambda p: torch.optim.Adagrad(p, lr=0.1), None, None),
    "Rprop": (lambda p: torch.optim.Rprop(p, lr=0.1), None, None),
    "ASGD": (lambda p: torch.optim.ASGD(p, lr=0.1), None, None),
    "LBFGS": (lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2), None, None),
}


class Net(nn.Module):
    """With a parameter of its own, and one that never gets a gradient."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 2)
        self.scale = nn.Parameter(torch.ones(3))
        self.unused = nn.Linear(2, 2)
        self.to(dtype)

    def forward(self, x):
        return self.last(self.norm(self.first(x))) * self.scale.sum()


def modules(model):
    """Parameters by the module that owns them."""
    return {name or "root": [*module.parameters(recurse=False)] for name, module in model.named_modules()}


def of_state(optimizer, parameters, field):
    return [optimizer.state[p][field].double() for p in parameters if field in optimizer.state.get(p, {})]


def expected(optimizer, model, before, momentum, second):
    """Tags and values, in float64."""
    values = {}
    for name, parameters in modules(model).items():
        for field, tag in ((momentum, "momentum_norm"), (second, "second_moment_rms")):
            tensors = of_state(optimizer, parameters, field)
            if tensors:
                flat = torch.cat([x.flatten() for x in tensors])
                of = flat.norm() if tag == "momentum_norm" else flat.square().mean().sqrt()
                values[f"optimizer/{tag}/{name}"] = of.item()
        if parameters:
            steps = torch.cat([(p.detach() - before[p]).double().flatten() for p in parameters])
            values[f"optimizer/step_rms/{name}"] = steps.square().mean().sqrt().item()
    return values


def found(writer, step):
    tags = [tag for tag in writer.tags() if tag.startswith("optimizer/")]
    return {tag: dict(writer.scalars(tag))[step] for tag in tags if step in dict(writer.scalars(tag))}


def step(model, optimizer, x):
    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_and_step_are_those_of_the_optimizer(kind, caplog):
    make, momentum, second = OPTIMIZERS[kind]
    model, writer = Net(), MemoryWriter()
    optimizer = make(model.parameters())
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(1, 4):
            before = {p: p.detach().clone() for p in model.parameters()}
            step(model, optimizer, torch.randn(6, 5))
            session.flush()
            values = expected(optimizer, model, before, momentum, second)
            assert found(writer, k) == pytest.approx(values, rel=1e-4, abs=1e-9)
    assert "is not known" not in caplog.text + session.summary()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_every_type_is_added_up_in_float64(dtype):
    model, writer = nn.Linear(3, 4, dtype=dtype), MemoryWriter()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, every=1):
        model(torch.randn(5, 3).to(dtype)).abs().square().mean().backward()
        optimizer.step()
    flat = torch.cat([torch.view_as_real(x).flatten() if x.is_complex() else x.flatten() for x in states(optimizer)])
    values = flat.double().norm().item()
    assert found(writer, 1)["optimizer/momentum_norm/root"] == pytest.approx(values, rel=1e-6)


def states(optimizer, field="exp_avg"):
    return [state[field] for state in optimizer.state.values()]


@given(values=st.lists(st.floats(width=32), min_size=1, max_size=30), cut=st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_shards_of_any_state_add_up_to_that_of_the_whole(values, cut):
    """Against a float64 twin; NaN and inf are left out, and where there is nothing else, it is NaN."""
    probe, x = torchprobe.OptimizerState(every=1), torch.tensor(values)
    parts = [probe.compute_all([part]).numpy() for part in (x[:cut], x[cut:])]
    (row,) = probe.combine_rows(*parts).tolist()
    by_source = {source: dict(zip(probe.fields, row, strict=True)) for source in probe.sources}
    tags = dict(probe.report_sources({"layer.weight": by_source}))
    finite = [value for value in x.double().tolist() if math.isfinite(value)]
    squares = math.fsum(value**2 for value in finite)
    rms = math.sqrt(squares / len(finite)) if finite else math.nan
    norm = math.sqrt(squares) if finite else math.nan
    assert tags == {
        "optimizer/momentum_norm/layer": pytest.approx(norm, rel=1e-6, nan_ok=True),
        "optimizer/second_moment_rms/layer": pytest.approx(rms, rel=1e-6, nan_ok=True),
    }


def test_of_several_optimizers_each_speaks_for_its_own_modules():
    model, writer = Net(), MemoryWriter()
    first = torch.optim.SGD(model.first.parameters(), lr=0.1, momentum=0.9)
    rest = torch.optim.Adam([*model.norm.parameters(), *model.last.parameters()], lr=0.1)
    with torchprobe.instrument(model, writer=writer, every=1):
        model(torch.randn(6, 5)).square().mean().backward()
        before = {p: p.detach().clone() for p in model.parameters()}
        first.step()
        rest.step()
    whole = expected(first, model, before, "momentum_buffer", None)
    whole |= {
        tag: value
        for tag, value in expected(rest, model, before, "exp_avg", "exp_avg_sq").items()
        if tag.endswith(("/norm", "/last"))
    }
    mine = {tag: value for tag, value in whole.items() if not tag.endswith(("/root", "/unused"))}
    assert found(writer, 1) == pytest.approx(mine, rel=1e-4)


class Lion(torch.optim.Optimizer):
    """Keeps its momentum under torch's name, and a second tensor under one of its own."""

    def __init__(self, parameters, name="exp_avg"):
        super().__init__(parameters, {"lr": 0.01})
        self.name = name

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    kept = self.state[p].setdefault(self.name, torch.zeros_like(p))
                    p.sub_(kept.lerp(p.grad, 0.1).sign(), alpha=group["lr"])
                    kept.lerp_(p.grad, 0.01)


def test_a_state_under_another_name_is_said_and_not_guessed(caplog):
    for name, known in (("exp_avg", True), ("ema", False)):
        model, writer = nn.Linear(4, 3), MemoryWriter()
        optimizer = Lion(model.parameters(), name)
        with torchprobe.instrument(model, writer=writer, every=1) as session:
            for _ in range(2):
                model(torch.ones(2, 4)).sum().backward()
                optimizer.step()
        assert ("optimizer/momentum_norm/root" in writer.tags()) is known
        assert "optimizer/step_rms/root" in writer.tags()
        assert ("'ema' of Lion's state" in session.summary()) is not known
    assert caplog.text.count("whether it is a momentum or a second moment is not known") == 1


def test_a_state_of_another_shape_is_no_moment():
    """One row a matrix, under the name of the second moment."""
    model, writer = nn.Linear(4, 3, bias=False), MemoryWriter()
    optimizer = Lion(model.parameters())
    optimizer.state[model.weight]["exp_avg_sq"] = torch.ones(3)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    assert "optimizer/second_moment_rms/root" not in writer.tags()
    assert "'exp_avg_sq' of Lion's state" in session.summary()


def test_nothing_is_added_to_the_state_of_an_optimizer():
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    assert dict(optimizer.state) == {}
    assert optimizer.state_dict()["state"] == {}


def test_only_sampled_steps_look_at_states(monkeypatch):
    from torchprobe.capture import parameters

    looked = []
    state = parameters.State
    monkeypatch.setattr(parameters, "State", lambda *arguments: looked.append(arguments) or state(*arguments))
    model = nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters())
    counts = []
    with torchprobe.instrument(model, writer=MemoryWriter(), every=3):
        for _ in range(6):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            counts.append(len(looked))
    assert counts == [2, 2, 4, 4, 4, 6]


def test_select_chooses_parameters():
    model, writer = Net(), MemoryWriter()
    optimizer = torch.optim.Adam(model.parameters())
    probe = torchprobe.OptimizerState(every=1, select="last")
    with torchprobe.instrument(model, writer=writer, probes=[probe]):
        model(torch.randn(3, 5)).sum().backward()
        optimizer.step()
    assert sorted(found(writer, 1)) == ["optimizer/momentum_norm/last", "optimizer/second_moment_rms/last"]
