"""A framework's run, watched or bare, and what the steps of the bare one are, as its own calls say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, TensorDataset

import torchprobe
from tests.setups.reference import wide
from torchprobe.testing import MemoryWriter


@dataclass
class Step:
    """What one step of the bare run was: the sum of what backward was called on, and the gradients that were used."""

    loss: float | None = None
    gradients: dict[Tensor, Tensor] = field(default_factory=dict)


class Run:
    """One run of a framework. Call it with the model before training begins."""

    def __init__(self, watched: bool, tmp: Any) -> None:
        self.tmp = tmp
        self.by_hand = False  # whether gradients come without a call of backward
        self.writer = MemoryWriter()
        self.steps: list[Step] = []
        self._watched = watched
        self._stepped = True
        torch.manual_seed(0)

    def __call__(self, model: Any) -> Any:
        self.model: nn.Module = model
        if self._watched:
            self.session = torchprobe.instrument(model, writer=self.writer, every=1)
        return model

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Of the bare run: every backward pass and optimizer step, as they are called."""
        original = torch.autograd.backward

        def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            self._backward(tensors)
            original(tensors, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
            patch.setattr(torch.autograd, "backward", backward)
            stack.callback(register_optimizer_step_pre_hook(self._before_step).remove)
            stack.callback(register_optimizer_step_post_hook(self._after_step).remove)
            yield

    def _backward(self, tensors: Tensor | tuple[Tensor, ...]) -> None:
        roots = [root for root in ([tensors] if isinstance(tensors, Tensor) else tensors) if self._reached_from(root)]
        if roots and self._stepped:
            self.steps.append(Step())
            self._stepped = False
        if roots and not any(p.grad.any() for p in self.model.parameters() if p.grad is not None):
            self.steps[-1].loss = None  # what came before was zeroed
        for root in roots:
            self.steps[-1].loss = (self.steps[-1].loss or 0.0) + root.double().item()

    def _reached_from(self, root: Tensor) -> bool:
        mine, seen, left = set(self.model.parameters()), {None}, [root.grad_fn]
        while left:
            node = left.pop()
            if node in seen:
                continue
            seen.add(node)
            if getattr(node, "variable", None) in mine:
                return True
            left += [following for following, _ in node.next_functions]
        return False

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._closure(args, kwargs):  # some optimizers change gradients while they step
            self._use(optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._closure(args, kwargs):
            self._use(optimizer)

    @staticmethod
    def _closure(args: Any, kwargs: Any) -> bool:
        return any(map(callable, [*args[1:], *kwargs.values()]))

    def _use(self, optimizer: Optimizer) -> None:
        mine = set(self.model.parameters())
        held = [p for group in optimizer.param_groups for p in group["params"] if p in mine and p.grad is not None]
        if held:
            if self.by_hand:
                self.steps.append(Step())
            self.steps[-1].gradients |= {p: wide(p.grad) for p in held}
            self._stepped = True


def trained(train: Callable[[Run], None], tmp: Any, watched: bool) -> tuple[Run, list[Tensor], Tensor]:
    """The run, its weights at the end, and the random state."""
    run = Run(watched, tmp)
    with nullcontext() if watched else run.measuring():
        train(run)
    weights, random_state = [p.detach().clone() for p in run.model.parameters()], torch.get_rng_state()
    if watched:
        run.session.detach()
    return run, weights, random_state


def needed(name: str) -> Any:
    """A module, or the test is skipped: also where one is there that was built for another torch."""
    try:
        return import_module(name)
    except Exception as reason:
        pytest.skip(f"needs {name}: {reason}")


# ---- small things to train


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))


def rows(count: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 8, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def loader() -> DataLoader:
    return DataLoader(TensorDataset(*rows()), batch_size=8)


def language_model(transformers: Any) -> nn.Module:
    torch.manual_seed(1)
    options = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**options, bos_token_id=0, eos_token_id=0))


def sentences(count: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 50, (count, 12), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]
