"""How far the mean over sampled query rows is from the exact one, for every head of a small model that has learnt.

    python -m benchmarks.attention_error [--steps 800]

Trains a character-level GPT (4 layers of 4 heads, width 128, 256 characters) on the standard library's source, which
takes minutes on one core, and prints the tables of docs/attention.md. Training is seeded; the text is that of the
running Python, so figures differ a little from version to version.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchprobe.statistics.attention import FIELDS, QueryKey, compute

LAYERS, HEADS, WIDTH, LENGTH, BATCH = 4, 4, 128, 256, 16
ROWS = (64, 128, 256, 512)
DRAWS = 200
MEANS = {"entropy": "rows", "max_probability": "rows", "sink": "rows_with_choice", "distance": "rows"}


def source_code() -> Tensor:
    """The standard library as characters below 128, file after file."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(path.read_bytes() for path in files)
    characters = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return characters[characters < 128].long()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, QueryKey]:
        q, k, v = self.qkv(self.ln1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln2(x)), QueryKey(q.detach(), k.detach(), 1 / math.sqrt(q.size(-1)), causal=True)


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(128, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, ids: Tensor) -> tuple[Tensor, list[QueryKey]]:
        """Logits, and what each layer's attention works on."""
        x, seen = self.embedding(ids) + self.position.weight, []
        for block in self.blocks:
            x, source = block(x)
            seen.append(source)
        return self.head(self.norm(x)), seen


def batch(text: Tensor, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(text) - LENGTH - 1, (BATCH, 1), generator=generator)
    return text[starts + torch.arange(LENGTH + 1)]


def train(model: GPT, text: Tensor, steps: int) -> float:
    """The loss of the last fifty steps, in nats a character."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        ids = batch(text, generator)
        loss = F.cross_entropy(model(ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-50:]) / len(losses[-50:])


def means(source: QueryKey, rows: int | str, seed: int = 0) -> dict[str, Tensor]:
    """The mean of each statistic, (heads,)."""
    table = compute(source, rows, torch.Generator().manual_seed(seed))
    return {name: table[:, FIELDS.index(name)] / table[:, FIELDS.index(count)] for name, count in MEANS.items()}


def errors(source: QueryKey, rows: int) -> dict[str, Tensor]:
    """Of `DRAWS` samples of rows, the errors of their means: (draws, heads)."""
    exact = means(source, "all")
    draws = [means(source, rows, seed) for seed in range(DRAWS)]
    return {name: torch.stack([draw[name] for draw in draws]) - exact[name] for name in MEANS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    torch.set_num_threads(1)
    text, model = source_code(), GPT()
    held_out, text = text[: len(text) // 10], text[len(text) // 10 :]
    ids = batch(held_out, torch.Generator().manual_seed(1))[:, :-1]
    with torch.no_grad():
        before = torch.stack([means(source, "all")["entropy"] for source in model(ids)[1]])
    loss = train(model, text, steps)
    with torch.no_grad():
        seen = model(ids)[1]
    print(f"{steps} steps, loss {loss:.2f} nats a character; {BATCH} held-out sequences of {LENGTH} characters.\n")
    print_heads(seen, before)
    print_others(seen)


def print_heads(seen: list[QueryKey], before: Tensor) -> None:
    """Entropy head by head: exact, and the root mean square error and the largest of all draws."""
    columns = " | ".join(f"{rows} rows" for rows in ROWS)
    print(f"| layer.head | untrained | trained, exact | {columns} |\n|{' --- |' * (3 + len(ROWS))}")
    for layer, source in enumerate(seen):
        exact = means(source, "all")["entropy"]
        of_rows = [errors(source, rows)["entropy"] for rows in ROWS]
        for head in range(HEADS):
            cells = [f"{e[:, head].square().mean().sqrt():.3f} ({e[:, head].abs().max():.3f})" for e in of_rows]
            print(f"| {layer}.{head} | {before[layer, head]:.3f} | {exact[head]:.3f} | {' | '.join(cells)} |")


def print_others(seen: list[QueryKey]) -> None:
    """For every statistic, the root mean square error of the head where it is largest."""
    print(f"\n| statistic, worst head | {' | '.join(f'{rows} rows' for rows in ROWS)} |\n|{' --- |' * (1 + len(ROWS))}")
    of_rows = [[errors(source, rows) for source in seen] for rows in ROWS]
    for name in MEANS:
        worst = [max(e[name].square().mean(0).sqrt().max() for e in layers) for layers in of_rows]
        print(f"| {name.replace('_', ' ')} | {' | '.join(f'{w:.3f}' for w in worst)} |")


if __name__ == "__main__":
    main()
