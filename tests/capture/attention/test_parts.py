"""Calls that have a part of an attention: some heads, sequences, keys or weights. All together are read, or none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.capture.attention.attends import HEADS, LENGTH, WIDTH, Attends, scores
from tests.capture.attention.harness import assert_untouched, record
from tests.capture.attention.reference import assert_close, of_weights

X = torch.randn(3, LENGTH, WIDTH)
CAUSAL = torch.ones(LENGTH, LENGTH).tril().bool()


class Free(nn.Module):
    """`run(self, q, k, v)` gives the output, and keeps weights (batch, heads, queries, keys)."""

    def __init__(self, run) -> None:
        super().__init__()
        self.qkv, self.run = nn.Linear(WIDTH, 3 * WIDTH), run
        self.qkv.weight.data *= 3

    def keep(self, w):
        self.p = w.detach()
        return w

    def forward(self, x):
        return self.run(self, *(t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)))


# ---- heads and sequences, one call each


def head_by_head(m, q, k):
    return torch.stack([scores(q[:, h], k[:, h]).softmax(-1) for h in range(HEADS)], 1)


def unbound(m, q, k):
    return torch.stack([scores(a, b).softmax(-1) for a, b in zip(q.unbind(1), k.unbind(1), strict=True)], -1).movedim(
        -1, 1
    )


def heads_and_queries(m, q, k):
    parts = ([scores(q[:, h, i : i + 3], k[:, h]).softmax(-1) for i in range(0, LENGTH, 3)] for h in range(HEADS))
    return torch.stack([torch.cat(each, 1) for each in parts], 1)


def each_alone(m, q, k):
    return torch.stack([torch.stack([scores(a, b).softmax(-1) for a, b in zip(*pair)]) for pair in zip(q, k)])  # noqa: B905


@pytest.mark.parametrize("weigh", [head_by_head, unbound, heads_and_queries, each_alone])
def test_heads_in_a_loop_are_heads(weigh):
    model = Attends(weigh)
    seen = record(model, X)
    assert_close(seen.heads["root"], of_weights(model.p))
    assert_untouched(model, X)


def sliced(size):
    def run(m, q, k, v):
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        parts = [slice(i, i + size) for i in range(0, len(q), size)]
        weights = [scores(q[one], k[one]).softmax(-1) for one in parts]
        m.keep(torch.cat(weights).unflatten(0, (-1, HEADS)))
        return torch.cat([w @ v[one] for w, one in zip(weights, parts, strict=True)])

    return run


@pytest.mark.parametrize("size", [1, 2, 4])
def test_slices_of_batch_and_heads_are_put_together(size):
    model = Free(sliced(size))
    seen = record(model, X)
    assert_close(seen.heads["root"], of_weights(model.p))


def test_slices_across_batch_and_heads_are_said_and_no_part_is_written():
    seen = record(Free(sliced(3)), X)
    assert seen.heads == {}
    assert set(seen.uncovered) == {"the attention of root, whose heads pass `getitem`"}


class Steps(nn.Module):
    """A decoder's steps are queries, not heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.cell = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x):
        k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        state, weights = x.mean(1), []
        for _ in range(LENGTH):
            weights.append(scores(self.q(state)[:, None].unflatten(-1, (HEADS, -1)).transpose(1, 2), k).softmax(-1))
            state = self.cell((weights[-1] @ v).flatten(1), state)
        self.p = torch.cat(weights, 2).detach()
        return state


def test_steps_of_a_decoder_are_no_heads():
    model = Steps()
    seen = record(model, X)
    ((_, heads),) = seen.heads.items()
    wanted = of_weights(model.p)
    for head, right in zip(heads, wanted, strict=True):
        assert head["entropy"] == pytest.approx(right["entropy"], abs=1e-4)


# ---- some weights alone


def run_of(use):
    def run(m, q, k, v):
        return use(m, m.keep(scores(q, k).softmax(-1)), v)

    return run


@pytest.mark.parametrize(
    "use",
    [
        lambda m, w, v: w[:, :1] @ v[:, :1],
        lambda m, w, v: w[:, :, -1:] @ v,
        lambda m, w, v: w[1:] @ v[1:],
        lambda m, w, v: (w[:, :, :4] @ v).mean() + (w[:, :, 2:6] @ v).mean(),
        lambda m, w, v: torch.stack(w.unbind(1), 1)[:, 1:] @ v[:, 1:],
    ],
)
def test_weights_of_which_a_part_is_used_are_not_read(use):
    seen = record(Free(run_of(use)), X)
    assert seen.heads == {}
    assert seen.uncovered == {"the attention of root, of whose weights a part is used alone": 1}


@pytest.mark.parametrize(
    "use",
    [
        lambda m, w, v: torch.stack([w[:, h] @ v[:, h] for h in range(HEADS)], 1),
        lambda m, w, v: torch.cat([part @ v for part in w.split(3, 2)], 2),
        lambda m, w, v: w.flatten(0, 1) @ v.flatten(0, 1),
        lambda m, w, v: (w @ w).detach().mean() + w @ v,  # a rollout beside
    ],
)
def test_weights_that_are_used_part_by_part_are_read_once(use):
    model = Free(run_of(use))
    seen = record(model, X)
    assert_close(seen.heads["root"], of_weights(model.p))
    assert seen.uncovered == {}


@pytest.mark.parametrize(
    "use",
    [
        lambda m, w, v: w @ w @ v,
        lambda m, w, v: w @ w.mT @ v,
        lambda m, w, v: torch.einsum("bhij,bhjk,bhkd->bhid", w, w, v),
        lambda m, w, v: torch.linalg.matrix_power(w, 2) @ v,
    ],
)
def test_products_of_weights_are_not_read_as_weights(use):
    seen = record(Free(run_of(use)), X)
    assert seen.heads == {}
    assert len(seen.uncovered) == 1


# ---- parts of the keys, merged


def merged(merge):
    def run(m, q, k, v):
        logits = [scores(q, part) for part in k.split(4, 2)]
        sums = [s.logsumexp(-1, keepdim=True) for s in logits]
        return merge([s.softmax(-1) @ part for s, part in zip(logits, v.split(4, 2), strict=True)], sums)

    return run


@pytest.mark.parametrize(
    "merge",
    [
        lambda o, s: sum(a * (b - torch.logaddexp(*s)).exp() for a, b in zip(o, s, strict=True)),
        lambda o, s: (torch.stack(o) * torch.stack(s).softmax(0)).sum(0),
        lambda o, s: o[0] - torch.sigmoid(s[1] - s[0]) * (o[0] - o[1]),
        lambda o, s: torch.lerp(*o, torch.sigmoid(s[1] - s[0])),
        lambda o, s: torch.einsum("sbhnd,sbhn->bhnd", torch.stack(o), torch.stack(s)[..., 0].softmax(0)),
    ],
)
def test_softmaxes_that_are_merged_by_their_sums_are_not_read(merge):
    model = Free(merged(merge))
    seen = record(model, X)
    assert seen.heads == {}
    assert "the attention of root, whose outputs are weighted by its scores" in seen.uncovered


@pytest.mark.parametrize("gate", [lambda q, o: o * q.sigmoid(), lambda q, o: o / o.norm(dim=-1, keepdim=True)])
def test_gates_of_other_things_change_nothing(gate):
    model = Free(lambda m, q, k, v: gate(q, m.keep(scores(q, k).softmax(-1)) @ v))
    assert_close(record(model, X).heads["root"], of_weights(model.p))


# ---- contexts of linear attention


@pytest.mark.parametrize(
    "attend",
    [
        lambda m, q, k, v: q @ (k.mT @ v).softmax(-2),
        lambda m, q, k, v: torch.einsum("bhnd,bhde->bhne", q, torch.einsum("bhnd,bhne->bhde", k, v).softmax(-2)),
        lambda m, q, k, v: ((v.mT @ k).softmax(-1) @ q.mT).mT,
    ],
)
def test_contexts_of_linear_attention_are_no_weights(attend):
    seen = record(Free(attend), X)
    assert seen.heads == {}
    assert seen.uncovered == {"the attention of root, between features, as in linear attention": 1}


def test_channels_that_attend_to_channels_are_read():
    model = Free(lambda m, q, k, v: m.keep(F.normalize(q.mT, dim=-1) @ F.normalize(k.mT, dim=-1).mT).softmax(-1) @ v.mT)
    assert set(record(model, X).heads) == {"root"}


# ---- keys in another order, masks that are added, other ways to write a softmax


@pytest.mark.parametrize(
    "weigh",
    [
        lambda m, q, k: scores(q, k).flip(-1, -2).softmax(-1).flip(-1, -2),
        lambda m, q, k: scores(q, k.flip(2)).softmax(-1).flip(-1),
        lambda m, q, k: scores(q, k).flip(-1).flip(-1).softmax(-1),
    ],
)
def test_flips_are_followed(weigh):
    model = Attends(weigh)
    assert_close(record(model, X).heads["root"], of_weights(model.p))


@pytest.mark.parametrize("value", [-5000.0, -5001.0, -1e4, torch.finfo(torch.float32).min / 2])
def test_an_added_mask_hides_from_minus_5000_on(value):
    model = Attends(lambda m, q, k: (scores(q, k) + (~CAUSAL) * value).softmax(-1))
    seen = record(model, X)
    assert_close(seen.heads["root"], of_weights(model.p, seen=CAUSAL))


def test_an_added_bias_of_minus_100_does_not_hide():
    model = Attends(lambda m, q, k: (scores(q, k) + (~CAUSAL) * -100.0).softmax(-1))
    found = record(model, X).heads["root"]
    assert_close(found, of_weights(model.p, seen=torch.ones_like(CAUSAL)))


def by_reciprocal(m, q, k):
    e = scores(q, k).exp()
    return e * (1 / e.sum(-1, keepdim=True))


@pytest.mark.parametrize(
    "weigh",
    [
        lambda m, q, k: F.softmin(-scores(q, k), dim=-1),
        lambda m, q, k: F.normalize(scores(q, k).exp(), p=1.0, dim=-1),
        lambda m, q, k: (e := torch.exp2(scores(q, k))) / e.sum(-1, keepdim=True),
        by_reciprocal,
    ],
)
def test_a_softmax_that_is_spelled_otherwise_is_read_as_it_is_used(weigh):
    model = Attends(weigh)
    seen = record(model, X)
    assert_close(seen.heads["root"], of_weights(model.p))
    assert seen.uncovered == {}


def test_a_softmax_by_the_logarithm_of_a_sum_is_said():
    def run(m, q, k, v):
        s = scores(q, k)
        return (s - s.exp().sum(-1, keepdim=True).log()).exp() @ v

    seen = record(Free(run), X)
    assert seen.heads == {}
    assert len(seen.uncovered) == 1


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = Free(lambda m, q, k, v: q)

    def forward(self, x, cache, at):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.attend.qkv(x).chunk(3, -1))
        hit = (torch.arange(LENGTH) == at)[:, None]
        return scores(q, torch.where(hit, k, cache)).softmax(-1) @ torch.where(hit, v, cache)


def test_a_token_that_a_choice_puts_into_a_cache_stands_where_it_is_not_known():
    cache = torch.randn(3, HEADS, LENGTH, WIDTH // HEADS)
    seen = record(Cached(), X[:, :1], cache, torch.tensor(4))
    assert all("entropy" in head and "distance" not in head for head in seen.heads["root"])
    assert len(seen.uncovered) == 1
