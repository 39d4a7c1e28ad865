"""Small models of several kinds with one training step each, for measurements beside peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpt import GPT, VOCABULARY, Loss, Training


def mlp() -> tuple[nn.Module, Loss]:
    """Of three small layers, as in a tutorial."""
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    x, y = torch.randn(128, 64), torch.randint(10, (128,))
    return model, lambda: F.cross_entropy(model(x), y)


class Policy(nn.Module):
    """A body with a head for actions and one for the value."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(17, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.action, self.value = nn.Linear(64, 6), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(x)
        return self.action(hidden), self.value(hidden).squeeze(-1)


def policy() -> tuple[nn.Module, Loss]:
    """A policy gradient's step."""
    model = Policy()
    x, action, gain = torch.randn(64, 17), torch.randint(6, (64,)), torch.randn(64)

    def loss() -> Tensor:
        logits, value = model(x)
        taken = F.log_softmax(logits, -1).gather(-1, action[:, None]).squeeze(-1)
        return F.mse_loss(value, gain) - (taken * gain).mean()

    return model, loss


def cnn() -> tuple[nn.Module, Loss]:
    """With batch normalisation, on images of 32 x 32."""

    def block(i: int, o: int) -> Iterator[nn.Module]:
        yield from (nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2))

    body = [*block(3, 32), *block(32, 64), *block(64, 128)]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    x, y = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    return model, lambda: F.cross_entropy(model(x), y)


class Tagger(nn.Module):
    """Two LSTM layers and a head at every token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(1000, 128), nn.LSTM(128, 256, 2, batch_first=True)
        self.head = nn.Linear(256, 20)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(ids))[0])


def lstm() -> tuple[nn.Module, Loss]:
    """On 16 sequences of 64 tokens."""
    model = Tagger()
    x, y = torch.randint(1000, (16, 64)), torch.randint(20, (16, 64))
    return model, lambda: F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def gpt(batch: int = 4) -> tuple[nn.Module, Loss]:
    """12 layers of width 384, on sequences of 256 tokens."""
    model = GPT()
    ids = torch.randint(0, VOCABULARY, (batch, 256))
    return model, lambda: F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


def gpt2() -> tuple[nn.Module, Loss]:
    """transformers' own, of the same shape."""
    from transformers import GPT2Config, GPT2LMHeadModel

    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    shape = {"n_embd": 384, "n_layer": 12, "n_head": 6, "n_positions": 256}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **shape, **off))
    ids = torch.randint(0, VOCABULARY, (4, 256))
    return model, lambda: model(ids, labels=ids).loss


Recipe = Callable[[], tuple[nn.Module, Loss]]


def compiled(recipe: Recipe) -> Recipe:
    """The same model, by `torch.compile`."""

    def made() -> tuple[nn.Module, Loss]:
        model, loss = recipe()
        model.compile()
        return model, loss

    return made


RECIPES: dict[str, Recipe] = {
    "MLP, 3 layers": mlp,
    "policy network": policy,
    "CNN, 3 blocks": cnn,
    "LSTM, 2 layers": lstm,  # which torch does not compile: it breaks the graph at nn.LSTM
    "GPT, 1,024 tokens": gpt,
    "GPT, 4,096 tokens": lambda: gpt(16),
    "GPT-2 (transformers)": gpt2,
    "MLP, compiled": compiled(mlp),
    "policy network, compiled": compiled(policy),
    "CNN, compiled": compiled(cnn),
    "GPT, 1,024 tokens, compiled": compiled(gpt),
    "GPT, 4,096 tokens, compiled": compiled(lambda: gpt(16)),
}


def training(recipe: str, extra: Callable[[nn.Module, int], None] | None = None) -> Training:
    """The same weights and data at every call."""
    torch.manual_seed(0)
    return Training(*RECIPES[recipe](), extra)
