"""Bugs between gradients and the optimizer: not held, not reached, zeroed too late or too early, never stepped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchprobe.records import Record
from torchprobe.rules.base import Diagnosis, Found, evidence, lasting

_NO_GRAD = 3.0  # of the reasons in `capture.diagnosis.modules` the last one that may be meant


@dataclass(frozen=True)
class UnoptimizedParameters(Diagnosis):
    """Parameters get gradients, no living optimizer holds them, and they have not changed in three samples."""

    name = "unoptimized_parameters"
    fact = "unheld"
    message = "these parameters get gradients, and no optimizer holds them: they are never updated"
    advice = (
        "Make the optimizer when the model is complete, `Adam(model.parameters())`, or `add_param_group` what was "
        "added or replaced later; what is to stay frozen is better `requires_grad_(False)` (PyTorch, "
        "torch.optim: constructing an optimizer)."
    )

    def judge(self, record: Record, kept: dict[str, Any]) -> Found:
        """Held by nobody, and standing still."""
        values = evidence(record, self.fact)
        still = kept.setdefault("still", {})
        for name in list(still):
            if name not in values:
                del still[name]
        for name, mark in values.items():
            last, count = still.get(name, (None, 0))
            still[name] = mark, (count + 1 if last == mark else 1)
        ill = {name: 0.0 for name in values if still[name][1] >= self.samples}
        strangers = sum(evidence(record, "strangers").values())
        more = f"; the optimizer holds {strangers:g} parameters that are not the model's" if strangers else ""
        return self.said(record.step, ill, self.message + (", as after a layer is replaced" + more if more else ""))


@dataclass(frozen=True)
class DetachedParameters(Diagnosis):
    """Held parameters have no gradient because what their module gives is detached before the loss sees it."""

    name = "detached_parameters"
    fact = "no_gradient"
    limit = _NO_GRAD
    message = "the optimizer holds these parameters, their module runs, and no gradient reaches them: the graph is cut"
    advice = (
        "Look between this module and the next for `.detach()`, `.data`, `.item()`, numpy, or `torch.tensor(...)` of a "
        "tensor, and take it out; if the cut is meant, leave the parameters out of the optimizer (PyTorch, Autograd "
        "mechanics)."
    )


@dataclass(frozen=True)
class UnusedParameters(Diagnosis):
    """Held parameters that get no gradient in a way that may be meant: a head that is not used, a frozen backbone."""

    name = "unused_parameters"
    serious = False
    fact = "no_gradient"
    message = "the optimizer holds these parameters, and no gradient reaches them"
    advice = (
        "Their module was not called, ran under `torch.no_grad()`, or its output is not part of the loss; if that is "
        "not meant, look there (PyTorch, Autograd mechanics)."
    )

    def judge(self, record: Record, kept: dict[str, Any]) -> Found:
        """All reasons but a cut graph."""
        values = evidence(record, self.fact)
        some = {name: why for name, why in values.items() if why <= _NO_GRAD}
        return self.said(record.step, lasting(kept, some, self.samples))


@dataclass(frozen=True)
class MissingZeroGrad(Diagnosis):
    """Each backward pass since an optimizer's last step found gradients that were still there, in samples running."""

    name = "missing_zero_grad"
    fact = "kept_gradient"
    message = "each backward pass adds to gradients that the optimizer has already used: nothing zeroes them"
    advice = (
        "Call `optimizer.zero_grad()` once between `optimizer.step()` and the next `backward()`. Without it each step "
        "follows the sum of all gradients so far (PyTorch, Zeroing out gradients in PyTorch)."
    )


@dataclass(frozen=True)
class ZeroGradBeforeStep(Diagnosis):
    """The optimizer finds no gradient although a backward pass has just given it some, in samples running."""

    name = "zero_grad_before_step"
    fact = "gradient_gone"
    message = "gradients are zeroed between backward() and optimizer.step(): the step finds none and changes nothing"
    advice = (
        "A step takes the gradients that it finds. Order the loop as `optimizer.zero_grad(); loss.backward(); "
        "optimizer.step()` (PyTorch, Optimizing model parameters)."
    )


@dataclass(frozen=True)
class NoOptimizerStep(Diagnosis):
    """So many backward passes, an optimizer in sight, and none has ever stepped."""

    backwards: int = 100

    name = "no_optimizer_step"
    fact = "backwards_without_step"
    message = "backward passes run, and optimizer.step() was never called: nothing is updated"
    advice = (
        "Call `optimizer.step()` after `backward()`; with GradScaler `scaler.step(optimizer)` (PyTorch, Optimizing "
        "model parameters)."
    )

    def judge(self, record: Record, kept: dict[str, Any]) -> Found:
        """As many as that in one step."""
        seen = evidence(record, self.fact).get("", 0.0)
        ill = seen >= self.backwards and not evidence(record, "rate")
        return [self.alert(record.step, None, seen, self.backwards, self.message)] if ill else []
