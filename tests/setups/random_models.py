"""Random models: every module maps (rows, WIDTH) to (rows, WIDTH), and may give more than that."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

WIDTH = 4


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
