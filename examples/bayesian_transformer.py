"""A Bayesian transformer that knows what it has not seen: explicit logging, validation, a checkpoint of the best.

It learns from which standard-library package ten lines of source come, by Monte-Carlo dropout. One package is never
shown in training: its passages are out of distribution, and epistemic uncertainty should be higher for them. At the end
the AUROC of that is printed: how often a passage of the unseen package is more uncertain than a held-out one of a
package that was seen. 0.5 is chance.

    python examples/bayesian_transformer.py
    torchprobe view runs/bayesian_transformer
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchprobe
from torchprobe.cli.bayesian_transformer import BayesianTransformer, monte_carlo_dropout
from torchprobe.cli.corpus import Part, standard_library, word_numbers
from torchprobe.statistics import out_of_distribution, uncertainty

UNSEEN = "email"  # the package that is left out of training
WORDS, VOCABULARY = 128, 8192


class Prediction(NamedTuple):
    """What the model says of a batch, and how sure it is."""

    logits: Tensor  # of each pass, (passes, batch, classes)
    probabilities: Tensor  # their mean, (batch, classes)
    epistemic: Tensor  # (batch,): what more data could teach, in nats
    aleatoric: Tensor  # (batch,): what is ambiguous in the text itself


class UncertainTransformer(nn.Module):
    """Several passes with different dropout are members of one prediction."""

    def __init__(self, classes: int, passes: int = 8) -> None:
        super().__init__()
        self.network = BayesianTransformer(classes, length=WORDS, vocabulary=VOCABULARY)
        self.passes = passes

    def forward(self, words: Tensor) -> Prediction:
        """words: (batch, length), word numbers. In training mode two passes are enough for the loss."""
        passes = 2 if self.network.training else self.passes
        logits = self.network(words.repeat(passes, 1)).unflatten(0, (passes, len(words)))
        probabilities = logits.detach().softmax(dim=-1)
        parts = uncertainty.classification(probabilities)  # softmax first, mean after
        return Prediction(logits, probabilities.mean(dim=0), parts.epistemic, parts.aleatoric)


@torch.no_grad()
def evaluate(
    model: nn.Module, data: TensorDataset, logger: torchprobe.TrainingLogger | None = None
) -> dict[str, float]:
    """Accuracy and loss; with a logger also calibration and uncertainty, under `val/`."""
    right, loss = 0.0, 0.0
    with monte_carlo_dropout(model):
        for words, labels in DataLoader(data, batch_size=128):
            prediction = model(words)
            right += (prediction.probabilities.argmax(dim=-1) == labels).sum().item()
            loss += F.nll_loss(prediction.probabilities.log(), labels, reduction="sum").item()
            if logger is not None:
                logger.log_calibration(prediction.probabilities, labels, prefix="val")
                logger.log_uncertainty_metrics(prediction.epistemic, prediction.aleatoric, prefix="val")
    return {"accuracy": right / len(data), "loss": loss / len(data)}


@torch.no_grad()
def epistemic_uncertainty(model: nn.Module, data: TensorDataset) -> Tensor:
    """Of every passage."""
    with monte_carlo_dropout(model):
        return torch.cat([model(words).epistemic for words, *_ in DataLoader(data, batch_size=128)])


def train(model: nn.Module, seen: TensorDataset, held_out: TensorDataset, steps: int, logger, best: Path) -> None:
    """Train; the weights with the lowest validation loss are kept in the file `best`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    validate_every, lowest = max(20, steps // 10), float("inf")
    model.train()
    for step, (words, labels) in enumerate(batches(seen, steps), start=1):
        prediction = model(words)
        loss = F.cross_entropy(prediction.logits.flatten(0, 1), labels.repeat(len(prediction.logits)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        logger.log_gradients(model)
        logger.log_learning_rate(optimizer)
        optimizer.step()
        schedule.step()
        logger.log_metrics({"loss": loss}, prefix="train")
        logger.log_uncertainty_metrics(prediction.epistemic, prediction.aleatoric)
        logger.log_calibration(prediction.probabilities, labels)
        logger.log_model_histograms(model)
        logger.increment_step()
        if step % validate_every == 0 or step == steps:
            validation = evaluate(model, held_out, logger)
            logger.log_metrics(validation, prefix="val")
            print(f"step {step}: accuracy {validation['accuracy']:.3f}, loss {validation['loss']:.3f}", flush=True)
            if validation["loss"] < lowest:
                lowest = validation["loss"]
                torch.save(model.state_dict(), best)


def batches(data: TensorDataset, steps: int, size: int = 32):
    """Batches in which every class is as likely as any other."""
    labels = data.tensors[1]
    weights = (1.0 / labels.bincount())[labels]
    sampler = torch.utils.data.WeightedRandomSampler(weights.tolist(), steps * size)
    return DataLoader(data, size, sampler=sampler)


def read(unseen: str, lines: int, seed: int) -> tuple[list[str], TensorDataset, TensorDataset, TensorDataset]:
    """The packages to learn; passages of theirs to train on, and of other files; passages of the unseen package."""
    corpus = standard_library(lines=lines, seed=seed)
    left_out = corpus.classes.index(unseen)
    classes = [name for name in corpus.classes if name != unseen]
    known = [classes.index(name) if name != unseen else -1 for name in corpus.classes]
    number = torch.tensor(known)

    def passages(part: Part, is_unseen: bool) -> TensorDataset:
        labels = torch.tensor(part.labels)
        words = torch.tensor([word_numbers(passage, WORDS, VOCABULARY) for passage in part.passages])
        chosen = (labels == left_out) == is_unseen
        return TensorDataset(words[chosen], number[labels[chosen]])

    return classes, passages(corpus.train, False), passages(corpus.held_out, False), passages(corpus.train, True)


def main(
    steps: int = 400, log_dir: str = "runs/bayesian_transformer", unseen: str = UNSEEN, seed: int = 0, passes: int = 8
) -> float:
    """Train, and return the AUROC of epistemic uncertainty."""
    torch.manual_seed(seed)
    classes, seen, held_out, other = read(unseen, lines=10, seed=seed)
    print(f"{len(seen)} passages of {', '.join(classes)}; unseen: {len(other)} of {unseen}")
    model = UncertainTransformer(len(classes), passes)
    best = Path(log_dir, "best.pt")
    with torchprobe.TrainingLogger(log_dir, log_gradients_every=10, log_histograms_every=50) as logger:
        train(model, seen, held_out, steps, logger, best)
        model.load_state_dict(torch.load(best, weights_only=True))
        inside, outside = epistemic_uncertainty(model, held_out), epistemic_uncertainty(model, other)
        auroc = out_of_distribution.summarise(out_of_distribution.compute(inside, outside))["auroc"]
        logger.log_uncertainty_metrics(outside, name="unseen", prefix="val")
        logger.log_metrics({"auroc": auroc}, prefix="val/ood")
        logger.log_hparams({"steps": steps, "seed": seed, "unseen": unseen, "passes": model.passes}, {"auroc": auroc})
    return auroc


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--log-dir", default="runs/bayesian_transformer")
    parser.add_argument("--unseen", default=UNSEEN, help="the package that is left out of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--passes", type=int, default=8, help="over one passage, outside training")
    arguments = parser.parse_args()
    auroc = main(arguments.steps, arguments.log_dir, arguments.unseen, arguments.seed, arguments.passes)
    print(f"AUROC of epistemic uncertainty, {arguments.unseen} against held-out passages: {auroc:.3f}")
