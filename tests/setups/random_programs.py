"""Random training loops of random models, and what their tags should say, as the loop itself computes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import torchprobe
from tests.setups.random_models import WIDTH, Dense, Model, Recipe, built
from tests.setups.reference import gradients, l2, moments, parameters
from torchprobe.testing import MemoryWriter

ROWS = 3


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
