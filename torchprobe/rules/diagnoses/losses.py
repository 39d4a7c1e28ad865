"""Bugs between the model's output and the loss, and in the targets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torchprobe.records import Record
from torchprobe.rules.base import Diagnosis, Found, evidence, group, lasting

_DOCS = "PyTorch, torch.nn"


@dataclass(frozen=True)
class SoftmaxBeforeCrossEntropy(Diagnosis):
    """Cross-entropy takes for logits what a softmax gave, in the model or behind it: by the graph, or by the values."""

    name = "softmax_before_cross_entropy"
    fact = "double_softmax"
    message = "softmax is applied before cross-entropy, which applies it again: it takes logits"
    advice = (
        "Take the softmax away from what the loss gets, and apply it only where probabilities are shown; with it the "
        f"loss cannot fall below ln(1 + (K - 1)/e) and gradients are small ({_DOCS}.CrossEntropyLoss)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        """By the graph at once; by the values alone, where the graph is hidden, in samples running."""
        values = evidence(record, self.fact)
        if not values:
            return None
        if values.get(""):
            return self.said(record.step, values)
        told = {name: value for name, value in evidence(record, "softmax_rows").items() if value > 0}
        return self.said(record.step, lasting(kept, told, self.samples))


@dataclass(frozen=True)
class SigmoidBeforeCrossEntropy(Diagnosis):
    """A sigmoid's output is taken for logits by cross-entropy."""

    samples: int = 1

    name = "sigmoid_before_cross_entropy"
    fact = "sigmoid_before_softmax"
    message = "sigmoid is applied before cross-entropy, which takes logits: no class can get far ahead of the others"
    advice = (
        "Take the sigmoid away from what the loss gets. For labels that do not exclude each other use "
        f"`BCEWithLogitsLoss` ({_DOCS}.CrossEntropyLoss)."
    )


@dataclass(frozen=True)
class SigmoidBeforeBce(Diagnosis):
    """A sigmoid's output is taken for logits by binary cross-entropy with logits."""

    samples: int = 1

    name = "sigmoid_before_bce_with_logits"
    fact = "double_sigmoid"
    message = "sigmoid is applied before binary cross-entropy with logits, which applies it again: it takes logits"
    advice = (
        "Take the sigmoid away from what the loss gets, or use `BCELoss` with it; with both no probability can leave "
        f"0.5 to 0.73 ({_DOCS}.BCEWithLogitsLoss)."
    )


@dataclass(frozen=True)
class NllWithoutLog(Diagnosis):
    """Negative log-likelihood of something that is no log-probability: probabilities, or raw scores."""

    samples: int = 1

    name = "nll_loss_without_log_softmax"
    fact = "nll_without_log"
    message = "nll_loss gets no log-probability of classes: a softmax, raw scores, or a log_softmax over the batch"
    advice = (
        "`nll_loss` only picks the target's entry, so that it falls without end. Use `cross_entropy` on logits, or "
        f"`nll_loss` on `log_softmax(dim=-1)` ({_DOCS}.NLLLoss)."
    )


@dataclass(frozen=True)
class BroadcastTargets(Diagnosis):
    """N outputs and N targets meet as (N, 1) and (N,), and the loss compares all pairs."""

    samples: int = 2

    name = "broadcast_targets"
    fact = "broadcast"
    message = "outputs and targets of shapes (N, 1) and (N,) are broadcast to (N, N): the loss compares all pairs"
    advice = (
        "Give both one shape, `output.squeeze(-1)` or `target.unsqueeze(-1)`; as it is, the model learns the mean of "
        "the targets (PyTorch, Broadcasting semantics)."
    )


@dataclass(frozen=True)
class ReluOutput(Diagnosis):
    """Outputs are cut off by a ReLU where the loss wants them lower."""

    name = "relu_on_output"
    fact = "rectified"
    limit = 0.05
    message = "the model's output is a ReLU, and where it is 0 the loss asks for less: those outputs cannot learn"
    advice = (
        "Take the ReLU off the last layer. Logits and targets of either sign need the whole line (Goodfellow et al. "
        "2016, Deep Learning, section 6.2.2)."
    )


@dataclass(frozen=True)
class LargeInitialLoss(Diagnosis):
    """The first cross-entropy is over three times that of guessing all of the classes alike."""

    times: float = 3.0

    name = "large_initial_loss"
    message = "the first loss is far above that of a guess, ln K: the model begins sure of wrong answers"
    advice = (
        "Look at the scale of the inputs and of the last layer's weights; they should give logits near 0 at first "
        "(Karpathy 2019, A recipe for training neural networks: verify loss at init)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        if kept.get("begun"):
            return []
        loss, classes = (evidence(record, fact).get("", math.nan) for fact in ("cross_entropy", "classes"))
        kept["begun"] = True
        if evidence(record, "scaled").get(""):  # on purpose, as a margin's or a temperature's logits are
            return []
        limit = self.times * math.log(classes) if classes > 1 else math.inf
        if not loss > limit:
            return []
        return [self.alert(record.step, None, loss, limit, self.message)]


@dataclass(frozen=True)
class TargetsAreInputs(Diagnosis):
    """Targets are the class numbers that the model was given at the same positions."""

    name = "targets_equal_inputs"
    serious = False
    fact = "targets_are_inputs"
    limit = 0.99
    message = "the targets are the model's own inputs, position by position: copying is all there is to learn"
    advice = (
        "For an autoencoder this is as it should be. A language model predicts the next token; shift them, "
        "`logits[:, :-1]` against `ids[:, 1:]` (Radford et al. 2018)."
    )


@dataclass(frozen=True)
class UnshiftedTargets(Diagnosis):
    """Targets are the inputs of the same position, and attention is causal: a language model whose targets were not
    shifted.
    """

    share: float = 0.99

    name = "unshifted_targets"
    message = "a causal model's targets are its inputs of the same position: it learns to copy, not to predict"
    advice = (
        "A language model predicts the next token. Shift them, `logits[:, :-1]` against `ids[:, 1:]` (Radford et al. "
        "2018, Improving language understanding by generative pre-training)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        equal, seen = evidence(record, "targets_are_inputs").get(""), _keys_seen(record)
        if equal is None or not seen:
            return None
        ill = equal > self.share and max(seen.values()) < 1 - _CLEARLY
        return self.said(record.step, lasting(kept, {"": equal} if ill else {}, self.samples))


@dataclass(frozen=True)
class AttendsToFuture(Diagnosis):
    """Targets are the next inputs, and in an attention every query sees every key: the answer is among them.

    How many keys are seen follows from attention's entropy and normalised entropy, whose quotient is the logarithm of
    that number where it is one for all queries, and smaller otherwise.
    """

    share: float = 0.99

    name = "attends_to_future"
    message = (
        "targets are the next inputs, and attention sees them: every query sees every key, no causal mask is there"
    )
    advice = (
        "The model reads the answer instead of predicting it. Pass `is_causal=True` or a mask that hides later "
        "positions (Vaswani et al. 2017, arXiv 1706.03762, section 3.2.3)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        following, seen = evidence(record, "targets_are_next").get(""), _keys_seen(record)
        if following is None or not seen:
            return None
        ill = {name: share for name, share in seen.items() if following > self.share and abs(share - 1) < _EXACTLY}
        return self.said(record.step, lasting(kept, ill, self.samples))


@dataclass(frozen=True)
class AttendsToPadding(Diagnosis):
    """In all attentions every query sees every token, and an embedding's `padding_idx` says that some are padding.

    Where attention's entropy is d below that of equal attention, a share m of it that lies on a share s of the tokens
    has m ln(m/s) + (1-m) ln((1-m)/(1-s)) <= d (data processing of relative entropy), in the mean over queries too. The
    value is the smallest such m, over all queries and over those that are no padding.
    """

    name = "attends_to_padding"
    limit = 0.01
    message = "attention sees padding: no padding mask is there, and at least this share of attention lies on it"
    advice = (
        "What is said of a sequence then depends on how long others of its batch are. Pass `key_padding_mask` "
        "(`src_key_padding_mask`, `attention_mask`) that is true where ids are padding (PyTorch, "
        "torch.nn.MultiheadAttention)."
    )

    def _look(self, record: Record, kept: dict[str, Any]) -> Found:
        share, met, tokens = (evidence(record, f).get("", 0.0) for f in ("padding", "padding_met", "padding_tokens"))
        seen, ill = _keys_seen(record, "padding_tokens"), {}
        if not seen:
            return None
        if 0 < share < 1 and all(abs(one - 1) < _EXACTLY for one in seen.values()):
            for name, entropy in group(record, "attention_entropy"):
                d = max(0.0, math.log(tokens) - entropy)
                ill[name] = min(_least(share, d), _least(met, d / (1 - share)))
        ill = {name: least for name, least in ill.items() if least > self.limit}
        return self.said(record.step, lasting(kept, ill, self.samples))


def _least(share: float, d: float) -> float:
    """The smallest share of attention on a share of the tokens that is within a relative entropy of d nats."""
    low, high = 0.0, share
    for _ in range(30):
        m = (low + high) / 2
        away = m * math.log(m / share) + (1 - m) * math.log((1 - m) / (1 - share))
        low, high = (m, high) if away > d else (low, m)
    return high


_CLEARLY, _EXACTLY = 0.02, 1e-4  # of the logarithm of the number of keys


def _keys_seen(record: Record, fact: str = "tokens") -> dict[str, float]:
    """By attention: the logarithm of the number of keys that a query sees, over that of the number of tokens."""
    tokens = evidence(record, fact).get("", 0.0)
    entropies, normalised = (dict(group(record, f"attention_entropy{kind}")) for kind in ("", "_normalized"))
    if tokens < _FEWEST_TOKENS:
        return {}
    return {
        name: entropy / normalised[name] / math.log(tokens)
        for name, entropy in entropies.items()
        if normalised.get(name, 0.0) > 0
    }


_FEWEST_TOKENS = 4


@dataclass(frozen=True)
class TargetLeak(Diagnosis):
    """A feature is the class number itself, up to scale and shift."""

    name = "target_leak"
    fact = "feature_tells_target"
    limit = 0.9999
    message = "a feature of the input is the target itself, up to its scale: the model reads the answer"
    advice = (
        "Take the target's column out of the inputs; look also for what was computed from it (Kaufman et al. 2012, "
        "Leakage in data mining, ACM TKDD 6)."
    )
