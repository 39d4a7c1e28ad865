"""How good the model is on held-out passages, and how sure, by Monte-Carlo dropout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torchprobe.cli.bayesian_transformer import monte_carlo_dropout

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
    return _summarise(_Judged(*(torch.cat(column) for column in zip(*results, strict=True))))


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


def _summarise(judged: _Judged) -> Validation:
    return Validation(
        accuracy=judged.right.float().mean().item(),
        loss=judged.loss.mean().item(),
        epistemic=judged.epistemic.mean().item(),
        epistemic_right=judged.epistemic[judged.right].mean().item(),
        epistemic_wrong=judged.epistemic[~judged.right].mean().item(),
        class_accuracy=tuple(judged.class_hits.nanmean(dim=0).tolist()),
    )
