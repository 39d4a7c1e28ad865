"""Runs as users record them: a small transformer classifier, well and ill; the docs show them."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import torchprobe

CLASSES, WORDS, LENGTH = 5, 20, 12


class Classifier(nn.Module):
    """A transformer encoder whose classes are the word that a sequence begins with, modulo the number of classes."""

    def __init__(self, layers: int = 4, heads: int = 4, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.position = nn.Parameter(torch.randn(LENGTH, width) * 0.1)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, words):
        x = self.embedding(words) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x):
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


def batch(size: int = 64):
    words = torch.randint(0, WORDS, (size, LENGTH))
    return words, words[:, 0] % CLASSES


def record(folder: Path | str, illness: str | None = None, *, steps: int = 60, every: int = 3, layers: int = 4) -> Path:
    """Train and record. illness: `dead` (a layer's ReLU dies), `nan` (a batch gives NaN), `collapse` (attention of one
    layer becomes one-hot) or `spike` (a batch with a loss of a thousand times the usual), each at half of the steps.
    """
    torch.manual_seed(0)
    model = Classifier(layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    hparams = {"lr": 1e-3, "layers": layers}
    with torchprobe.instrument(model, log_dir=folder, every=every, hparams=hparams) as session:
        for step in range(1, steps + 1):
            words, classes = batch()
            if step == steps // 2:
                _make_ill(model, illness)
            loss = F.cross_entropy(model(words), classes)
            if illness == "spike" and step == steps // 2:
                loss = loss * 1000
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.log_metrics({"loss": loss}, prefix="train")
            if step % (5 * every) == 0:
                _validate(model, session)
    return Path(session.log_dir)


def _validate(model, session):
    words, classes = batch()
    with torch.no_grad():
        logits = model(words)
    session.log_predictions(logits.softmax(-1), classes)
    session.log_metrics({"loss": F.cross_entropy(logits, classes)}, prefix="val")


@torch.no_grad()
def _make_ill(model, illness):
    if illness == "dead":
        model.blocks[1].mlp[0].bias.fill_(-100)
    elif illness == "nan":
        model.blocks[2].mlp[0].weight[0, 0] = float("nan")
    elif illness == "collapse":
        model.blocks[2].attention.in_proj_weight.mul_(60)
