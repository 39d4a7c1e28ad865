"""A small transformer that classifies rows of word numbers, and can say how sure it is by Monte-Carlo dropout.

Plain PyTorch, with nothing in it that knows of instrumentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torchprobe.cli.corpus import PADDING


class SelfAttention(nn.Module):
    """Multi-head attention of every position to the positions that `visible` allows."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """x: (batch, length, width). visible: bool, (batch, 1, 1, length). Returns the shape of x."""
        batch, length, width = x.shape
        projected = self.query_key_value(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        output: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, length, width))
        return output


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a feed-forward network, each added to its input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """x: (batch, length, width). visible: bool, (batch, 1, 1, length). Returns the shape of x."""
        x = x + self.dropout(self.attention(self.attention_norm(x), visible))
        output: Tensor = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return output


class BayesianTransformer(nn.Module):
    """Word numbers in, class logits out; dropout stands for the doubt about the weights (Gal & Ghahramani 2016)."""

    def __init__(
        self,
        classes: int,
        *,
        vocabulary: int = 8192,
        length: int = 128,
        width: int = 64,
        heads: int = 4,
        depth: int = 2,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.word_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)
        # With PyTorch's default of 1 the blocks' output drowns, and learning takes far more steps.
        nn.init.normal_(self.word_embedding.weight, std=0.1)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, words: Tensor) -> Tensor:
        """words: int64, (batch, length up to the longest), at least one a row not padding. Returns (batch, classes)."""
        visible = words != PADDING
        positions = torch.arange(words.shape[1], device=words.device)
        x = self.dropout(self.word_embedding(words) + self.position_embedding(positions))
        for block in self.blocks:
            x = block(x, visible[:, None, None, :])
        weights = visible.unsqueeze(-1).to(x.dtype)
        mean = (self.norm(x) * weights).sum(dim=1) / weights.sum(dim=1)
        logits: Tensor = self.classifier(self.dropout(mean))
        return logits


@contextmanager
def monte_carlo_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for everything but dropout, which stays on; afterwards every module is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    try:
        yield
    finally:
        for module, training in modes:  # those inside come later
            module.train(training)


Batch = tuple[Tensor, Tensor]
"""Word numbers, int64 (batch, length), and class numbers, int64 (batch,)."""


@dataclass(frozen=True, slots=True)
class Validation:
    """Means over the held-out passages; information in nats; a mean over no passage is NaN."""

    accuracy: float
    loss: float
    epistemic: float
    epistemic_right: float
    epistemic_wrong: float
    class_accuracy: tuple[float, ...]

    def metrics(self) -> dict[str, float]:
        """What is worth a curve."""
        return {"accuracy": self.accuracy, "loss": self.loss, "epistemic": self.epistemic}


def epistemic_uncertainty(probabilities: Tensor) -> Tensor:
    """Mutual information of class and weights (BALD): H(mean p) - mean H(p), in nats, never negative.

    probabilities: (passes, batch, classes). Returns (batch,).
    """
    total: Tensor = torch.special.entr(probabilities.mean(dim=0)).sum(dim=-1)
    aleatoric: Tensor = torch.special.entr(probabilities).sum(dim=-1).mean(dim=0)
    return (total - aleatoric).clamp_min(0.0)


@torch.no_grad()
def validate(
    model: nn.Module,
    held_out: TensorDataset,
    *,
    passes: int,
    batch_size: int,
    device: torch.device,
    log_predictions: Callable[[Tensor, Tensor], None] = lambda probabilities, labels: None,
) -> Validation:
    """Predict every held-out passage `passes` times with dropout on, and judge the mean prediction.

    log_predictions: told each batch's mean prediction, (batch, classes), and its labels.
    """
    results: list[_Judged] = []
    with monte_carlo_dropout(model):
        for words, labels in DataLoader(held_out, batch_size=batch_size):
            on_device = words.to(device)
            probabilities = torch.stack([model(on_device).softmax(dim=-1) for _ in range(passes)])
            log_predictions(probabilities.mean(dim=0), labels)
            results.append(_judge(probabilities.cpu(), labels))
    judged = _Judged(*(torch.cat(column) for column in zip(*results, strict=True)))
    return Validation(
        accuracy=judged.right.float().mean().item(),
        loss=judged.loss.mean().item(),
        epistemic=judged.epistemic.mean().item(),
        epistemic_right=judged.epistemic[judged.right].mean().item(),
        epistemic_wrong=judged.epistemic[~judged.right].mean().item(),
        class_accuracy=tuple(judged.class_hits.nanmean(dim=0).tolist()),
    )


class _Judged(NamedTuple):
    """What is known of each passage: tensors of shape (passages,); class_hits is (passages, classes), else NaN."""

    right: Tensor
    loss: Tensor
    epistemic: Tensor
    class_hits: Tensor


def _judge(probabilities: Tensor, labels: Tensor) -> _Judged:
    mean = probabilities.mean(dim=0)
    right = mean.argmax(dim=-1) == labels
    is_class = nn.functional.one_hot(labels, mean.shape[-1]).bool()
    return _Judged(
        right=right,
        # The log of a mean probability is normalised already, so this is the loss of the mean prediction.
        loss=nn.functional.cross_entropy(mean.clamp_min(torch.finfo(mean.dtype).tiny).log(), labels, reduction="none"),
        epistemic=epistemic_uncertainty(probabilities),
        class_hits=right.float().unsqueeze(-1).where(is_class, torch.nan),
    )
