"""Random models and loops: weights bitwise those of the loop without torchprobe, values those of a float64 oracle."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchprobe
from torchprobe.testing import MemoryWriter

WIDTH = 4
LEAVES = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "in place": lambda: nn.ReLU(inplace=True),
    "tanh": nn.Tanh,
    "dropout": lambda: nn.Dropout(0.2),
    "frozen": lambda: nn.Linear(WIDTH, WIDTH).requires_grad_(False),
}


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x.clone())


class Pair(nn.Module):
    """Takes two inputs, gives a dict, and calls one module twice."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x, None)["out"]

    def both(self, x: Tensor, other: Tensor | None) -> dict[str, Tensor]:
        return {"out": self.inner(self.inner(x.clone()).clone()), "kept": x}


def tree(shape: Any, shared: list[nn.Module]) -> nn.Module:
    """A module of a drawn shape: the name of a leaf, "again" for one that is there already, or a kind and its parts."""
    if shape == "again":
        return shared[0] if shared else nn.Identity()
    if isinstance(shape, str):
        made = LEAVES[shape]()
        if shape == "linear":
            shared.append(made)
        return made
    kind, parts = shape
    inner = nn.Sequential(*(tree(part, shared) for part in parts))
    return {"sequential": lambda m: m, "residual": Residual, "pair": Pair}[kind](inner)


LEAF = st.sampled_from([*LEAVES, "again"])
SHAPES = st.recursive(
    LEAF,
    lambda inner: st.tuples(
        st.sampled_from(["sequential", "residual", "pair"]), st.lists(inner, min_size=1, max_size=3)
    ),
    max_leaves=6,
)


class Loop(NamedTuple):
    micro: int
    clip: bool
    validate: bool
    skip: int  # a batch whose gradients are dropped
    again: bool  # detached and attached again in the middle
    adam: bool


LOOPS = st.builds(
    Loop,
    micro=st.integers(1, 3),
    clip=st.booleans(),
    validate=st.booleans(),
    skip=st.sampled_from([0, 2]),
    again=st.booleans(),
    adam=st.booleans(),
)
STEPS = 4


def build(shape: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), tree(shape, []), nn.Linear(WIDTH, 2))


def loop(model: nn.Module, program: Loop, watch: Any, seen: list[dict[str, float]]) -> list[Tensor]:
    """Train, noting what the gradients and the loss were, in float64; the weights at the end."""
    torch.manual_seed(1)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 0.01) if program.adam else torch.optim.SGD(trained, 0.05, momentum=0.9)
    session = watch(model) if watch else None
    for step in range(1, STEPS + 1):
        total = 0.0
        for _ in range(program.micro):
            loss = model(torch.randn(3, WIDTH)).square().mean() / program.micro
            loss.backward()
            total += loss.item()
        if step == program.skip:
            optimizer.zero_grad()
            continue
        if program.clip:
            nn.utils.clip_grad_norm_(trained, 0.1)
        seen.append({"loss": total} | {n: p.grad.double().norm().item() for n, p in named(model) if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
        if program.validate:
            with torch.no_grad():
                model.eval()(torch.randn(2, WIDTH))
                model.train()
        if session is not None and program.again and step == 3:
            session.detach()
            session = watch(model)
    if session is not None:
        assert session.detach()
    return [p.detach().clone() for p in model.parameters()]


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


@given(shape=SHAPES, program=LOOPS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_weights_are_bitwise_the_same_and_values_those_of_the_oracle(shape, program):
    bare, writers, expected = build(shape), [], []
    watched = copy.deepcopy(bare)

    def watch(model: nn.Module) -> torchprobe.Session:
        writers.append(MemoryWriter())
        return torchprobe.instrument(model, writer=writers[-1], every=1, rules=[])

    try:
        weights = loop(bare, program, None, expected)
    except RuntimeError as error:  # an in-place operation on what another one has saved
        assume("modified by an inplace operation" not in str(error))
        raise
    random = torch.get_rng_state()
    found = loop(watched, program, watch, [])
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(a, b) for a, b in zip(found, weights, strict=True))
    records = [values for writer in writers for values in by_step(writer)]
    assert len(records) == len(expected)
    for values, step in zip(records, expected, strict=True):
        loss = step.pop("loss")
        assert values["overview/loss"] == pytest.approx(loss, rel=1e-5)
        assert {n: values[f"grad_norm/{n}"] for n in step} == pytest.approx(step, rel=1e-4, abs=1e-12)


def by_step(writer: MemoryWriter) -> list[dict[str, Any]]:
    """Values of the steps that an optimizer took."""
    steps: dict[int, dict[str, Any]] = {}
    for record in writer.records:
        steps.setdefault(record.step, {}).update(record.values)
    return [values for _, values in sorted(steps.items()) if "overview/grad_norm" in values]


def test_the_shapes_are_those_that_users_write():
    """Sharing, reuse, several inputs and outputs, in-place operations and frozen parts are all among them."""
    shape = ("pair", ["linear", ("residual", ["again", "frozen", "in place"])])
    model = build(shape)
    assert len({id(p) for p in model.parameters()}) < sum(len([*m.parameters(recurse=False)]) for m in calls(model))
    assert model(torch.ones(1, WIDTH)).shape == (1, 2)


def calls(model: nn.Module) -> list[nn.Module]:
    return [m for _, m in model.named_modules(remove_duplicate=False)]
