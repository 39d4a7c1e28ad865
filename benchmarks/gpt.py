"""The model that overheads are measured on: a GPT of 12 layers, width 384, and one training step of it."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[], Tensor]
BATCH, LENGTH, WIDTH, LAYERS, HEAD, VOCABULARY = 4, 256, 384, 12, 64, 512


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, width // HEAD, HEAD).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.ln2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    def __init__(
        self, layers: int = LAYERS, width: int = WIDTH, length: int = LENGTH, vocabulary: int = VOCABULARY
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(ids) + self.position.weight)))


class Training:
    """A model, its optimizer and a loss on fixed data; `extra` is what a logger does between backward and step."""

    def __init__(self, model: nn.Module, loss: Loss, extra: Callable[[nn.Module, int], None] | None = None) -> None:
        self.model, self.loss, self.extra = model, loss, extra
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self.steps = 0

    def step(self) -> float:
        """Seconds of one training step."""
        start = perf_counter()
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.steps += 1
        if self.extra is not None:
            self.extra(self.model, self.steps)
        self.optimizer.step()
        return perf_counter() - start


class Run(Training):
    """The GPT on one batch of sequences."""

    def __init__(
        self,
        extra: Callable[[nn.Module, int], None] | None = None,
        *,
        batch: int = BATCH,
        layers: int = LAYERS,
        width: int = WIDTH,
    ) -> None:
        torch.manual_seed(0)
        model = GPT(layers, width)
        self.ids = torch.randint(0, VOCABULARY, (batch, LENGTH))
        super().__init__(model, lambda: F.cross_entropy(model(self.ids).flatten(0, 1), self.ids.flatten()), extra)
