"""The training that all scenarios share, and what was recorded of it as plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchprobe
from tests.clocks import reproducible
from tests.models import Transformer
from torchprobe.records import Histogram
from torchprobe.testing import MemoryWriter

STEPS = 3
LIMIT = 0.1  # below every gradient norm here


def transformer() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(dropout=0.0)
    for block in model.blocks:  # the gradient of a key's bias is 0 in exact arithmetic, and all rounding here
        block.attention.qkv.register_parameter("bias", None)
    return model


class SplitAttention(nn.Module):
    """Queries, keys and values by a layer each, so that ranks can have some of the heads each."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.size = size  # of a head

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(out.transpose(1, 2).flatten(-2))


def split_transformer() -> Transformer:
    """The same with layers that tensor parallelism can cut."""
    model = transformer()
    for block in model.blocks:
        block.attention = SplitAttention(16, 4)
        block.mlp[1] = nn.ReLU()  # tensor parallelism forbids in-place operations on its outputs
    return model


class Scaled(Transformer):
    """With a parameter of two elements, which leaves nothing for the third and fourth rank."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.scale = nn.Parameter(torch.tensor([0.5, 0.75]))
        for block in self.blocks:
            block.attention.qkv.register_parameter("bias", None)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.scale.sum()


def scaled() -> Scaled:
    torch.manual_seed(0)
    return Scaled()


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.LayerNorm(8), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 2)
    )


def sequences(step: int) -> Tensor:
    return torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(step))


def alone_on_sequences() -> Any:
    """The training of `normed` in one process."""
    model, writer = normed(), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, probes=probes()):
        for k in range(STEPS):
            model(sequences(k)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return values(writer)


def tokens(step: int, size: int = 8) -> Tensor:
    """The whole batch of a step."""
    return torch.randint(0, 11, (size, 7), generator=torch.Generator().manual_seed(step))


def micro_batches(step: int) -> tuple[Tensor, Tensor]:
    return tokens(2 * step), tokens(2 * step + 1)


@torch.no_grad()
def validate(model: nn.Module, ids: Tensor) -> None:
    model.eval()
    model(ids)
    model.train()


def part(batch: Tensor, rank: int, ranks: int) -> Tensor:
    return batch.chunk(ranks)[rank]


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), ids.roll(1, 1).flatten())


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)


def probes(**options: Any) -> list[Any]:
    return [
        torchprobe.Gradients(every=1),
        torchprobe.Parameters(every=1),
        torchprobe.Updates(every=1),
        torchprobe.OptimizerState(every=1),
        torchprobe.Activations(every=1),
        torchprobe.Attention(every=1, rows="all", eval=True),
        torchprobe.Histograms(every=1),
        torchprobe.LearningRates(),
        torchprobe.Loss(every=1),
    ]


def train(
    model: nn.Module,
    batches: Iterable[Iterable[Tensor]],
    between: Callable[[int], Any] = lambda k: None,
    optimizer: torch.optim.Optimizer | None = None,
    limit: float | None = None,
) -> None:
    """One optimizer step for each list of micro-batches. limit: of the gradient norm."""
    optimizer = optimizer or sgd(model)
    own = getattr(model, "clip_grad_norm_", None)  # FullyShardedDataParallel's
    for k, micro in enumerate(batches):
        micro = list(micro)
        for ids in micro:
            (loss_of(model(ids), ids) / len(micro)).backward()
        if limit is not None:
            own(limit) if own else nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
        optimizer.zero_grad()
        between(k)


def values(writer: MemoryWriter) -> dict[str, dict[str, Any]]:
    """Values by tag and step."""
    found: dict[str, dict[str, Any]] = {}
    for record in writer.records:
        for tag, value in record.values.items():
            plain = _plain(value)
            if plain is not None and reproducible(tag):
                found.setdefault(tag, {})[str(record.step)] = plain
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Histogram):
        return {"edges": value.edges.tolist(), "counts": value.counts.tolist()}
    if hasattr(value, "tolist"):
        return value.tolist()
    return value if isinstance(value, float | int) else None


def alone(
    batches: Iterable[Iterable[Tensor]],
    between: Callable[[nn.Module, int], Any] | None = None,
    make: Callable[[], nn.Module] = transformer,
    limit: float | None = None,
) -> Any:
    """The same training in one process."""
    model, writer = make(), MemoryWriter()
    with torchprobe.instrument(model, writer=writer, probes=probes()):
        train(model, batches, lambda k: between(model, k) if between else None, limit=limit)
    return values(writer)
