"""How good the model is on held-out passages, and how sure, by Monte-Carlo dropout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, DataLoader

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
    total = torch.special.entr(probabilities.mean(dim=0)).sum(dim=-1)
    aleatoric = torch.special.entr(probabilities).sum(dim=-1).mean(dim=0)
    return (total - aleatoric).clamp_min(0.0)


@torch.no_grad()
def validate(model: nn.Module, held_out: Dataset[Batch], *, passes: int, batch_size: int, device: torch.device) -> Validation:
    """Predict every held-out passage `passes` times with dropout on, and judge the mean prediction."""
    loader = DataLoader(held_out, batch_size=batch_size)
    loss_function = nn.CrossEntropyLoss(reduction="none")
    results: list[Tensor] = []
    with monte_carlo_dropout(model):
        for batch in loader:
            words, labels = (tensor.to(device) for tensor in batch)
            probabilities = torch.stack([model(words).softmax(dim=-1) for _ in range(passes)])
            mean = probabilities.mean(dim=0)
            # The log of a mean probability is normalised already, so the loss is that of the mean prediction.
            losses = loss_function(mean.log(), labels)
            right = mean.argmax(dim=-1) == labels
            results.append(torch.stack([labels, right, losses, epistemic_uncertainty(probabilities)]).cpu())
    labels, right, losses, epistemic = torch.cat(results, dim=1)
    return _summarise(labels.long(), right.bool(), losses, epistemic)


def _summarise(labels: Tensor, right: Tensor, losses: Tensor, epistemic: Tensor) -> Validation:
    hits = right.float()
    return Validation(
        accuracy=hits.mean().item(),
        loss=losses.mean().item(),
        epistemic=epistemic.mean().item(),
        epistemic_right=epistemic[right].mean().item(),
        epistemic_wrong=epistemic[~right].mean().item(),
        class_accuracy=tuple(hits[labels == label].mean().item() for label in range(int(labels.max()) + 1)),
    )
