"""Random models and training loops, and what their tags should say, as the loop itself computes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import torchprobe
from tests.setups.reference import gradients, l2, moments, parameters
from torchprobe.testing import MemoryWriter

WIDTH, ROWS = 4, 3


# ---- models: every module maps (rows, WIDTH) to (rows, WIDTH), and may give more than that


class Dense(nn.Module):
    """A layer that writes its own outputs down, in training with gradients."""

    def __init__(self, seen: list[tuple[Dense, Tensor]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 2)
        self.bias = nn.Parameter(torch.randn(WIDTH) / 2)
        self.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight + self.bias
        if self.training and torch.is_grad_enabled():
            self.seen.append((self, y.detach().clone()))
        return y


class Several(nn.Module):
    """Gives what it computes in a container, beside None and a number."""

    def __init__(self, inner: nn.Module, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = inner, kind

    def forward(self, x: Tensor, scale: float | None = None) -> Any:
        y = first(self.inner(x))
        return {"tuple": (y, None), "dict": {"hidden": y, "count": 3}, "list": [y, x]}[self.kind]


class Sum(nn.Module):
    """Parts that may be None or occur twice, added up."""

    def __init__(self, parts: list[nn.Module | None]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            if part is not None:
                x = x + first(part(x))
        return x


class Model(nn.Module):
    """The root: takes a keyword argument too. What the loss uses beside the output: weights of its terms, a head."""

    def __init__(self, body: nn.Module, head: Dense, beside: str) -> None:
        super().__init__()
        self.body, self.head = body, head
        if "weights" in beside:
            self.weights = nn.Parameter(torch.zeros(WIDTH))
        if "head" in beside:
            self.auxiliary = nn.Linear(WIDTH, 1)

    def loss(self, y: Tensor) -> Tensor:
        """Of an output."""
        terms = y.square().mean(0)
        if hasattr(self, "weights"):
            terms = terms * (-self.weights).exp() + self.weights.square()
        return terms.mean() + (self.auxiliary(y).square().mean() if hasattr(self, "auxiliary") else 0)

    def forward(self, x: Tensor, *, shift: Tensor | None = None) -> Tensor:
        hidden = first(self.body(x))
        return self.head(hidden if shift is None else hidden + shift)


def first(output: Any) -> Tensor:
    """The tensor that goes on."""
    if isinstance(output, dict):
        return output["hidden"]
    return output if isinstance(output, Tensor) else output[0]


Recipe = tuple[Any, ...]
_LEAVES = st.sampled_from(
    [("dense",), ("dense",), ("tanh",), ("relu",), ("relu in place",), ("norm",), ("frozen",), ("dropout",)]
)
RECIPES: st.SearchStrategy[Recipe] = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.tuples(st.just("chain"), st.lists(inner, min_size=1, max_size=3)),
        st.tuples(st.just("sum"), st.lists(inner, min_size=1, max_size=2), st.booleans(), st.booleans()),
        st.tuples(st.just("several"), inner, st.sampled_from(["tuple", "dict", "list"])),
    ),
    max_leaves=5,
)


def built(recipe: Recipe, seen: list[tuple[Dense, Tensor]]) -> nn.Module:
    """A module by its recipe; the random state decides the weights."""
    kind = recipe[0]
    if kind in ("dense", "frozen"):
        return Dense(seen).requires_grad_(kind == "dense")
    if kind == "chain":
        return Chain([built(part, seen) for part in recipe[1]])
    if kind == "sum":
        parts: list[nn.Module | None] = [built(part, seen) for part in recipe[1]]
        return Sum(parts + parts[:1] * recipe[2] + [None] * recipe[3])
    if kind == "several":
        return Several(built(recipe[1], seen), recipe[2])
    return {
        "tanh": nn.Tanh(),
        "relu": nn.ReLU(),
        "relu in place": Fresh(),
        "norm": nn.LayerNorm(WIDTH),
        "dropout": nn.Dropout(0.2),
    }[kind]


class Chain(nn.Module):
    """One after the other, whatever each gives."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = first(part(x))
        return x


class Fresh(nn.Module):
    """A ReLU in place, on a copy of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x * 1.5)


# ---- loops


@dataclass(frozen=True)
class Turn:
    """One iteration: micro-batches, and what else happens in it."""

    micro: int = 1
    clip: bool = False
    scale: float = 1.0
    acts: bool = False  # a pass with gradients whose output is thrown away
    drops: bool = False  # a batch whose gradients are zeroed before they are used
    validates: str = ""  # after the step: "no_grad", "eval" with gradients, "train" mode without
    in_place: bool = False  # how gradients are zeroed
    shift: bool = False
    forwards_first: bool = False  # all forward passes before the first backward


TURNS = st.builds(
    Turn,
    micro=st.integers(1, 3),
    clip=st.booleans(),
    scale=st.sampled_from([1.0, 0.25]),
    acts=st.booleans(),
    drops=st.booleans(),
    validates=st.sampled_from(["", "", "no_grad", "eval", "train"]),
    in_place=st.booleans(),
    shift=st.booleans(),
    forwards_first=st.booleans(),
)


@dataclass
class Truth:
    """What one step is, in float64."""

    loss: float = 0.0
    gradients: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)

    def tags(self) -> Iterator[tuple[str, float]]:
        """Those that are checked, with their values."""
        yield "overview/loss", self.loss
        yield "overview/grad_norm", l2(*self.gradients.values())
        for name, gradient in self.gradients.items():
            yield f"grad_norm/{name}", l2(gradient)
            yield f"param_norm/{name}", l2(self.after[name])
            if norm := l2(self.before[name]):
                yield f"update_ratio/{name}", l2(self.after[name] - self.before[name]) / norm
        for name, outputs in self.outputs.items():
            for statistic, value in moments(torch.cat(outputs)).items():
                yield f"activation_{statistic}/{name}", value


class Program:
    """A model and its loop; `run` gives the truth of each step, and wraps nothing."""

    def __init__(self, recipe: Recipe, optimizer: str, seed: int, beside: str) -> None:
        torch.manual_seed(seed)
        self.seen: list[tuple[Dense, Tensor]] = []
        self.model = Model(built(recipe, self.seen), Dense(self.seen), beside)
        self.optimizer: torch.optim.Optimizer = {
            "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
            "adam": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
        }[optimizer](self.model.parameters())
        self._names: dict[Dense, str] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, Dense):
                self._names.setdefault(module, name)

    def loss(self, turn: Turn) -> Tensor:
        """Of a new batch."""
        shift = torch.ones(WIDTH) if turn.shift else None
        return self.model.loss(self.model(torch.randn(ROWS, WIDTH), shift=shift)) * turn.scale

    def run(self, turn: Turn) -> Truth:
        """One iteration."""
        if turn.acts:
            self.loss(turn)
        if turn.drops:
            self.loss(turn).backward()
            self._zero(turn)
        self.seen.clear()
        losses = self._backward(turn)
        if turn.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        truth = Truth(float(sum(losses)), gradients(self.model), parameters(self.model))
        for module, output in self.seen:
            truth.outputs.setdefault(self._names[module], []).append(output)
        self.optimizer.step()
        truth.after = parameters(self.model)
        self._zero(turn)
        if turn.validates:
            self._validate(turn)
        return truth

    def _backward(self, turn: Turn) -> list[float]:
        if turn.forwards_first:
            kept = [self.loss(turn) for _ in range(turn.micro)]
            for loss in kept:
                loss.backward()
            return [loss.item() for loss in kept]
        values = []
        for _ in range(turn.micro):
            loss = self.loss(turn)
            loss.backward()
            values.append(loss.item())
        return values

    def _zero(self, turn: Turn) -> None:
        self.optimizer.zero_grad(set_to_none=not turn.in_place)

    def _validate(self, turn: Turn) -> None:
        self.model.train(turn.validates == "train")
        with nullcontext() if turn.validates == "eval" else torch.no_grad():
            self.loss(turn)
        self.model.train()


@dataclass(frozen=True)
class Watched:
    """What torchprobe wrote of a program, step by step, and the truth of those steps."""

    truths: list[Truth]
    written: list[dict[str, float]]
    weights: list[Tensor]
    random_state: Tensor


def run(
    recipe: Recipe,
    optimizer: str,
    seed: int,
    turns: list[Turn],
    sessions: list[int],
    beside: str = "",
    every: int | None = 1,
) -> Watched:
    """Run a program; sessions: how many turns each session sees, one after the other. With none it runs bare."""
    program = Program(recipe, optimizer, seed, beside)
    truths: list[Truth] = []
    written: list[dict[str, float]] = []
    remaining = iter(turns)
    for length in sessions:
        writer = MemoryWriter()
        with torchprobe.instrument(program.model, writer=writer, every=every) as session:
            here = [program.run(turn) for _, turn in zip(range(length), remaining, strict=False)]
        assert "is left out" not in session.summary()
        truths += here
        written += [
            {tag: dict(writer.scalars(tag)).get(step) for tag in writer.tags()} for step in range(1, len(here) + 1)
        ]
    for turn in remaining:
        program.run(turn)
    return Watched(truths, written, [p.detach().clone() for p in program.model.parameters()], torch.get_rng_state())
