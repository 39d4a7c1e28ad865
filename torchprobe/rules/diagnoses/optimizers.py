"""Bugs of optimizers: parameters not held or not reached, gradients zeroed too late or too early, no step, no rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchprobe.records import EVIDENCE, Record
from torchprobe.rules.base import LOSS_TAGS, Diagnosis, Found, evidence, first_of, group, lasting

_CHANCE = 1e-6  # of a parameter that is used now and then to get no gradient in so many samples
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

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        values = evidence(record, self.fact)
        kept["still"] = still = {name: one for name, one in kept.get("still", {}).items() if name in values}
        for name, mark in values.items():
            last, count = still.get(name, (None, 0))
            still[name] = mark, (count + 1 if last == mark else 1)
        ill = {name: 0.0 for name in values if still[name][1] >= self.samples}
        strangers = sum(evidence(record, "strangers").values())
        message = self.message
        if strangers:
            message += (
                ", as after a layer is replaced or load_state_dict(assign=True); the optimizer holds "
                f"{strangers:g} parameters that are not the model's"
            )
        return self.said(record.step, ill, message)


@dataclass(frozen=True)
class DetachedParameters(Diagnosis):
    """Held parameters have no gradient because what their module gives is detached before the loss sees it; or none of
    the model has had one in any sample, as where the loss is made of numbers.
    """

    name = "detached_parameters"
    fact = "no_gradient"
    limit = _NO_GRAD
    message = "the optimizer holds these parameters, their module runs, and no gradient reaches them: the graph is cut"
    advice = (
        "Look between this module and the next for `.detach()`, `.data`, `.item()`, numpy, or `torch.tensor(...)` of a "
        "tensor, and take it out; if the cut is meant, leave the parameters out of the optimizer (PyTorch, Autograd "
        "mechanics)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        cut = {name: why for name, why in evidence(record, self.fact).items() if why > self.limit}
        never = _never(record, kept, 2.0, self.samples)
        return self.said(record.step, lasting(kept.setdefault("cut", {}), cut, self.samples) | never)


@dataclass(frozen=True)
class UnusedParameters(Diagnosis):
    """Held parameters that get no gradient in a way that may be meant: a head that is not used, a frozen backbone.

    Where some have one now and then, as under stochastic depth, it takes so many samples running that by their share of
    samples without one it is no chance.
    """

    name = "unused_parameters"
    serious = False
    fact = "no_gradient"
    message = "the optimizer holds these parameters, and no gradient reaches them"
    advice = (
        "Their module was not called, ran under `torch.no_grad()`, or its output is not part of the loss; if that is "
        "not meant, look there (PyTorch, Autograd mechanics)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        """All reasons but a cut graph; or an optimizer that has found nothing in any sample, while others do."""
        some = {name: why for name, why in evidence(record, self.fact).items() if why <= _NO_GRAD}
        never = _never(record, kept, 1.0, self.samples)
        if not some and not evidence(record, "empty_step"):  # no step that tells
            return self.said(record.step, never)
        samples = kept["samples"] = kept.get("samples", 0) + 1
        gone = kept.setdefault("gone", {})  # by name: samples without a gradient, running and in all
        for name in {**gone, **some}:
            running, whole = gone.get(name, (0, 0))
            gone[name] = (running + 1, whole + 1) if name in some else (0, whole)
        shares = {name: _share_before(samples, *one) for name, one in gone.items() if one[1] < samples}
        others = max(shares.values(), default=0.0)  # what is known of one that never had a gradient
        ill = {
            name: why
            for name, why in some.items()
            if gone[name][0] >= self.samples and shares.get(name, others) ** gone[name][0] < _CHANCE
        }
        return self.said(record.step, ill | never)


def _share_before(samples: int, running: int, whole: int) -> float:
    """Of the samples before the last `running` ones the share without a gradient, which may well be a bit larger."""
    return float((whole - running + 1) / (samples - running + 2))


def _never(record: Record, kept: dict[str, Any], kind: float, samples: int) -> dict[str, float]:
    """The first parameter of each optimizer that, in so many samples and all it has had, found no gradient at all."""
    counts = kept.setdefault("never", {})
    for name, value in evidence(record, "empty_step").items():
        counts[name] = counts.get(name, 0) + 1 if value == kind and counts.get(name, 0) >= 0 else -1
    return {name: kind for name, count in counts.items() if count >= samples}


@dataclass(frozen=True)
class UnusedEmbeddingRows(Diagnosis):
    """Of `lookups` look-ups a row in samples, none was of a quarter of the rows, nor had those a gradient; all others
    had three and more and no new one came in the later half, so that no rare ones are to come (Chao 1984).
    """

    lookups: int = 20
    share: float = 0.25
    rows: int = 16

    name = "unused_embedding_rows"
    serious = False
    fact = "rows_unused"
    message = "so many rows of the embedding were never looked up: the vocabulary is larger than what the data use"
    advice = (
        "Unused rows cost memory, and are random numbers should they ever be looked up. Make `num_embeddings` the size "
        "of the vocabulary that the data have; look whether ids are clipped or hashed to a part of it (PyTorch, "
        "torch.nn.Embedding)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        """By table; what is kept is since how many look-ups there were no new rows."""
        values, ill = evidence(record, self.fact), {}
        rare, sizes, counts = (evidence(record, fact) for fact in ("rows_rare", "rows", "lookups"))
        for name, unused in values.items():
            if kept.get(name, (0, None))[1] != unused:
                kept[name] = counts[name], unused
            many = unused >= max(self.rows, self.share * sizes[name])
            settled = not rare[name] and counts[name] >= max(self.lookups * sizes[name], 2 * kept[name][0])
            if many and settled:
                ill[name] = unused
        return self.said(record.step, ill) if values else None


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

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        seen = evidence(record, self.fact).get("", 0.0)
        ill = seen >= self.backwards and not evidence(record, "rate")
        return [self.alert(record.step, None, seen, self.backwards, self.message)] if ill else []


@dataclass(frozen=True)
class LearningRateZero(Diagnosis):
    """The largest learning rate of all samples so far is 0, after so many steps."""

    steps: int = 20

    name = "learning_rate_zero"
    message = "the learning rate has been 0 since the run began: steps change nothing"
    advice = (
        "Look at the optimizer's `lr`, and at what a scheduler multiplies it with. In a `LambdaLR` integer division or "
        "a warm-up that is counted in epochs gives 0 (PyTorch, torch.optim.lr_scheduler)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        rates = evidence(record, "rate").values()
        if not rates:
            return None
        kept["largest"] = largest = max(*rates, kept.get("largest", 0.0))
        ill = largest == 0 and record.step >= self.steps
        return [self.alert(record.step, None, 0.0, None, self.message)] if ill else []


@dataclass(frozen=True)
class LearningRateDecaysEarly(Diagnosis):
    """The rate has been below a thousandth of its largest for over a quarter of the run, and 50 steps, so far; in the
    steps between samples, too, lest they meet the lows of a schedule with restarts.
    """

    share: float = 1e-3
    steps: int = 50

    name = "learning_rate_decays_early"
    reads = (EVIDENCE, "lr/")
    message = "the learning rate fell below a thousandth of its largest long ago: most of the run cannot learn"
    advice = (
        "A scheduler that counts epochs is often stepped every batch. Call `scheduler.step()` once an epoch, or give "
        "it the number of batches (PyTorch, torch.optim: how to adjust learning rate)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        """Since which sample it is that low, with a loss that is still worth learning."""
        if kept.get("since") and any(rate >= self.share * kept["largest"] for _, rate in group(record, "lr")):
            kept["since"] = None
        rates = evidence(record, "rate").values() if record.evidence else ()
        if not rates:
            return None
        kept["largest"] = largest = max(*rates, kept.get("largest", 0.0))
        low = max(rates) < self.share * largest
        kept["since"] = kept.get("since") or record.step if low else None
        loss = first_of(record, LOSS_TAGS)
        if loss is not None:
            kept.setdefault("first", loss[1])
        learnt = loss is not None and loss[1] < 0.1 * kept.get("first", 0.0)
        spent = record.step - kept["since"] if low else 0
        ill = spent >= self.steps and spent > record.step / 4 and not learnt
        return [self.alert(record.step, None, max(rates), self.share * largest, self.message)] if ill else []
