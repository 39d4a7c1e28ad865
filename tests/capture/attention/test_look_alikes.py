"""What only looks like attention is not taken for it, and nothing is said of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.capture.attention.harness import record

WIDTH = 8


def gating(model, x):
    probabilities = (x @ model.router).softmax(-1)  # a mixture of experts
    return torch.einsum("ble,bled->bld", probabilities, x[..., None, :] * model.experts)


def normalised_router(model, x):
    router = F.normalize(model.router.to(torch.float32), dim=0)
    return (F.normalize(x, dim=-1) @ router).softmax(-1) @ model.experts


def classifier(model, x):
    return model.linear(x).softmax(-1)


def codebook(model, x):
    return (x @ model.experts.t()).softmax(-1) @ model.experts


def similarity(model, x):
    return (x @ x.mT).softmax(-1)  # a contrastive head: nothing is summed with it


def log_softmax(model, x):
    return F.log_softmax(x @ x.mT, dim=-1) @ x


def squeeze_and_excite(model, x):
    return x * model.linear(x.mean(1, keepdim=True)).softmax(-1)


def linear_attention(model, x):
    q, k = x.softmax(-1), x.softmax(1)
    return q @ (k.mT @ x)


def gram(model, x):
    return (x.mT @ x).flatten(1).softmax(-1)[:, :WIDTH] @ x.flatten(1)[:, :WIDTH].mT


def assignment_update(model, x):
    assigned = (x @ model.centres(x).mT).softmax(-1)  # soft k-means: sums over the points, not over the centres
    return assigned.mT @ x


def pooling(model, x):
    return model.linear(x)[..., :1].softmax(1).mT @ x


def sampled_tokens(model, x):
    scores = x @ x.mT
    best = scores.max(dim=-1).values.softmax(-1)
    return best.unsqueeze(1) @ x


class LookAlike(nn.Module):
    def __init__(self, run) -> None:
        super().__init__()
        self.run = run
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.router = nn.Parameter(torch.randn(WIDTH, 4))
        self.experts = nn.Parameter(torch.randn(4, WIDTH))

    def centres(self, x):
        return self.linear(x[:, :3])

    def forward(self, x):
        return self.run(self, x)


@pytest.mark.parametrize(
    "run",
    [
        *(gating, normalised_router, classifier, codebook, similarity, log_softmax, squeeze_and_excite),
        *(linear_attention, gram, assignment_update, pooling, sampled_tokens),
    ],
)
def test_a_look_alike_is_not_taken_for_attention(run):
    seen = record(LookAlike(run), torch.randn(2, WIDTH, WIDTH))
    assert seen.heads == {}
    assert seen.uncovered == {}


class Router(nn.Module):
    """A mixture of experts whose keys are made of parameters by a function."""

    def __init__(self, keys) -> None:
        super().__init__()
        self.keys, self.scale = nn.Parameter(torch.randn(4, WIDTH)), nn.Parameter(torch.ones(4, 1))
        self.each, self.experts = nn.ParameterList(torch.randn(WIDTH) for _ in range(4)), nn.Linear(WIDTH, 4 * WIDTH)
        self.register_buffer("frozen", torch.randn(4, WIDTH))
        self.run, self.bare, self.several = keys, torch.randn(4, WIDTH), [torch.randn(4, WIDTH)]

    def forward(self, x):
        self.x = x
        weights = (x @ self.run(self).mT).softmax(-1)
        return torch.einsum("bte,btec->btc", weights, self.experts(x).unflatten(-1, (4, WIDTH)))


@pytest.mark.parametrize(
    "keys",
    [
        lambda m: torch.cat([each[None] for each in m.each]),
        lambda m: F.layer_norm(m.keys, (WIDTH,)) * m.scale,
        lambda m: m.keys.flip(0)[:, :WIDTH].contiguous().clone(),
        lambda m: torch.where(m.keys > 0, m.keys, m.frozen),
        lambda m: F.linear(m.keys, m.frozen.mT @ m.frozen).tanh(),
        lambda m: m.frozen.roll(1, 0) + torch.eye(4, WIDTH),
        lambda m: m.bare,
        lambda m: m.several[0].t().contiguous().t(),
        lambda m: m.keys.type_as(m.x),
        lambda m: m.keys.to(m.x),
        lambda m: torch.ones_like(m.x[0, :4]) * m.keys,
        lambda m: m.x.new_ones(4, WIDTH) + m.keys,
    ],
)
def test_a_router_is_no_attention_however_its_keys_are_made(keys):
    seen = record(Router(keys), torch.randn(2, 5, WIDTH))
    assert seen.heads == {}
    assert seen.uncovered == {}


class LinearAttention(nn.Module):
    """Keys with a softmax over the tokens, multiplied with values first."""

    def __init__(self, project) -> None:
        super().__init__()
        self.run, self.each = project, nn.Parameter(torch.randn(2, 4, 4))
        self.k, self.w = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(2, WIDTH, 4))

    def forward(self, x):
        q, v = (x.unflatten(-1, (2, 4)).transpose(1, 2) for _ in range(2))
        return q.softmax(-1) @ (self.run(self, x).softmax(-2).mT @ v)


@pytest.mark.parametrize(
    "project",
    [
        lambda m, x: m.k(x).unflatten(-1, (2, 4)).transpose(1, 2),
        lambda m, x: torch.einsum("bnc,hcd->bhnd", x, m.w),
        lambda m, x: torch.einsum("bhnc,hcd->bhnd", x.unflatten(-1, (2, 4)).transpose(1, 2), m.each),
    ],
)
def test_linear_attention_has_no_map(project):
    seen = record(LinearAttention(project), torch.randn(2, 5, WIDTH))
    assert seen.heads == {}


class Remembers(nn.Module):
    """Keys of an earlier pass, one of each sequence, are no constants though a module holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.cache = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), None

    def forward(self, x):
        self.cache = self.k(x).detach() if self.cache is None else self.cache
        return (self.q(x) @ self.cache.mT).softmax(-1) @ self.cache


def test_what_was_remembered_of_a_pass_is_no_constant():
    model = Remembers()
    model(torch.randn(2, 5, WIDTH))
    assert list(record(model, torch.randn(2, 5, WIDTH)).heads) == ["root"]
