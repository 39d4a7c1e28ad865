"""Attention in less usual hand: the keys in another dimension, learned queries, a softmax of exp and sum."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.capture.attention.harness import assert_untouched, record
from tests.capture.attention.reference import assert_close, causal, per_head

WIDTH, HEADS, LENGTH, LATENTS = 8, 2, 6, 3
SCALE = 1 / math.sqrt(WIDTH / HEADS)


class Written(nn.Module):
    """Projects, and leaves the attention to a function of queries, keys and values (batch, heads, length, width)."""

    def __init__(self, attend) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.latents = nn.Parameter(torch.randn(HEADS, LATENTS, WIDTH // HEADS))
        self.table = nn.Parameter(torch.randn(LENGTH, WIDTH // HEADS))
        self.attend = attend

    def project(self, x):
        return self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        return self.attend(self, *self.project(x))


def logits(model, x, mask=None):
    q, k, _ = model.project(x)
    found = q.double() @ k.double().mT * SCALE
    return found if mask is None else found.masked_fill(~mask, -math.inf)


# ---- the keys in another dimension


def keys_down(model, q, k, v):
    return (k @ q.mT * SCALE).softmax(-2).mT @ v


def keys_down_counted_from_the_front(model, q, k, v):
    weights = torch.softmax(torch.matmul(k, q.transpose(2, 3)) * SCALE, dim=2)
    return torch.einsum("bhkq,bhkd->bhqd", weights, v)


def heads_last(model, q, k, v):
    weights = (torch.einsum("bhqd,bhkd->bqkh", q, k) * SCALE).softmax(2)
    return torch.einsum("bqkh,bhkd->bqhd", weights, v)


def heads_in_between(model, q, k, v):
    weights = (torch.einsum("bhqd,bhkd->bqhk", q, k) * SCALE).softmax(-1)
    return torch.einsum("bqhk,bhkd->bqhd", weights, v)


def heads_moved(model, q, k, v):
    weights = (torch.einsum("bhqd,bhkd->bqkh", q, k) * SCALE).permute(0, 3, 2, 1).softmax(-2)
    return weights.transpose(-1, -2) @ v


@pytest.mark.parametrize(
    "attend", [keys_down, keys_down_counted_from_the_front, heads_last, heads_in_between, heads_moved]
)
def test_a_softmax_over_any_dimension_of_keys_is_found(attend):
    model, x = Written(attend), torch.randn(2, LENGTH, WIDTH)
    seen = record(model, x)
    assert list(seen.heads) == ["root"]
    assert_close(seen.heads["root"], per_head(logits(model, x)))
    assert_untouched(model, x)


def test_a_causal_mask_may_lie_on_its_side():
    mask = causal(LENGTH, LENGTH)
    attend = lambda m, q, k, v: (k @ q.mT * SCALE).masked_fill(~mask.mT, -math.inf).softmax(-2).mT @ v  # noqa: E731
    model, x = Written(attend), torch.randn(2, LENGTH, WIDTH)
    assert_close(record(model, x).heads["root"], per_head(logits(model, x, mask)))


def test_attention_of_each_to_the_other_is_two_sites():
    """As co-attention has it: both directions of one product."""

    def attend(model, q, k, v):
        scores = q @ k.mT * SCALE
        return scores.softmax(-1) @ v + scores.softmax(-2).mT @ q

    model, x = Written(attend), torch.randn(2, LENGTH, WIDTH)
    seen = record(model, x)
    assert list(seen.heads) == ["root", "root/2"]
    assert_close(seen.heads["root"], per_head(logits(model, x)))
    assert_close(seen.heads["root/2"], per_head(logits(model, x).mT))


# ---- learned queries


def latents_times_keys(model, q, k, v):
    return (model.latents @ k.mT * SCALE).softmax(-1) @ v


def expanded_latents(model, q, k, v):
    return (model.latents.unsqueeze(0).expand(len(k), -1, -1, -1) @ k.mT * SCALE).softmax(-1) @ v


def einsum_of_latents(model, q, k, v):
    weights = (torch.einsum("hqd,bhkd->bhqk", model.latents, k) * SCALE).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def latents_second(model, q, k, v):
    weights = (torch.einsum("bhkd,hqd->bhqk", k, model.latents) * SCALE).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


@pytest.mark.parametrize("attend", [latents_times_keys, expanded_latents, einsum_of_latents, latents_second])
def test_parameters_may_be_queries(attend):
    model, x = Written(attend), torch.randn(2, LENGTH, WIDTH)
    seen = record(model, x)
    expected = model.latents.double() @ model.project(x)[1].double().mT * SCALE
    assert_close(seen.heads["root"], per_head(expected))
    assert_untouched(model, x)


@pytest.mark.parametrize("positions_first", [True, False])
def test_relative_positions_from_parameters_are_part_of_the_logits(positions_first):
    """A product with a table, which alone is no attention, is added on either side."""

    def attend(model, q, k, v):
        scores, positions = q @ k.mT * SCALE, torch.einsum("bhqd,kd->bhqk", q, model.table)
        return (positions + scores if positions_first else scores + positions).softmax(-1) @ v

    model, x = Written(attend), torch.randn(2, LENGTH, WIDTH)
    q = model.project(x)[0].double()
    expected = logits(model, x) + q @ model.table.double().mT
    assert_close(record(model, x).heads["root"], per_head(expected))


# ---- a softmax that is written out


def normalised_before(model, q, k, v):
    e = torch.exp(q @ k.mT * SCALE)
    return (e / e.sum(-1, keepdim=True)) @ v


def normalised_after(model, q, k, v):
    e = (q @ k.mT * SCALE).exp()
    return (e @ v) / e.sum(dim=-1, keepdim=True)


def stabilised(model, q, k, v):
    s = q @ k.mT * SCALE
    e = (s - s.amax(-1, keepdim=True)).exp()
    return (e / (torch.sum(e, -1).unsqueeze(-1) + 1e-9)) @ v


def in_place(model, q, k, v):
    e = (q @ k.mT * SCALE).exp()
    weights = e.clone()
    weights /= e.sum(3, True)
    return weights @ v


def logarithm(model, q, k, v):
    return torch.nn.functional.log_softmax(q @ k.mT * SCALE, dim=-1).exp() @ v


def logarithm_of_keys_down(model, q, k, v):
    return (k @ q.mT * SCALE).log_softmax(-2).exp().mT @ v


WRITTEN_OUT = [normalised_before, normalised_after, stabilised, logarithm, logarithm_of_keys_down]


@pytest.mark.parametrize("attend", WRITTEN_OUT)
def test_exp_and_sum_are_a_softmax(attend):
    model, x = Written(attend), torch.randn(2, LENGTH, WIDTH)
    seen = record(model, x)
    assert list(seen.heads) == ["root"]
    assert_close(seen.heads["root"], per_head(logits(model, x)))
    assert seen.uncovered == {}
    assert_untouched(model, x)


@pytest.mark.parametrize("attend", WRITTEN_OUT)
def test_so_they_are_of_a_single_key(attend):
    """As at the first step of a loop, whose query counts as all others do."""
    model, x = Written(attend), torch.randn(2, 1, WIDTH)
    right = [{name: head[name] for name in ("rows", "entropy", "max_logit")} for head in per_head(logits(model, x))]
    assert_close(record(model, x).heads["root"], right)


def expanded(s):
    return s - s.amax(-1, keepdim=True).expand_as(s)


def of_all(s):
    return s - s.max()


def scaled_after(s):
    return ((s / 0.5 - (s / 0.5).amax(-1, keepdim=True)) * 2).mul_(0.25) / 1.0


def scaled_by_another(s):
    return (s - s.amax(-1, keepdim=True)) * s.new_tensor(0.5)


def clamped_after(s):
    return (s - s.amax(-1, keepdim=True)).clamp(min=-60)


@pytest.mark.parametrize("queries", [1, 3, LENGTH])
@pytest.mark.parametrize("keys", [1, LENGTH])
@pytest.mark.parametrize("shift", [expanded, of_all, scaled_after, scaled_by_another, clamped_after])
def test_the_largest_logit_is_what_it_was_before_a_shift_or_not_written(shift, keys, queries):
    def attend(model, q, k, v):
        model.s = q[:, :, :queries] @ k[:, :, :keys].mT * SCALE
        return shift(model.s).softmax(-1) @ v[:, :, :keys]

    model = Written(attend)
    found = [head.get("max_logit") for head in record(model, torch.randn(2, LENGTH, WIDTH)).heads["root"]]
    known = shift in (expanded, of_all, scaled_after)
    assert found == (pytest.approx(model.s.amax((0, 2, 3)).tolist(), abs=1e-4) if known else [None] * HEADS)


@pytest.mark.parametrize(
    "softmax", [lambda s: torch._softmax(s, -1, False), lambda s: torch._log_softmax(s, -1, False).exp()]
)
def test_a_softmax_of_another_name_is_one(softmax):
    model, x = Written(lambda model, q, k, v: softmax(q @ k.mT * SCALE) @ v), torch.randn(2, LENGTH, WIDTH)
    assert_close(record(model, x).heads["root"], per_head(logits(model, x)))


def test_the_temperature_of_a_gumbel_softmax_is_no_dimension():
    def attend(model, q, k, v):
        weights = torch.nn.functional.gumbel_softmax(q @ k.mT * SCALE, 1)
        model.p = weights.detach()
        return weights @ v

    model = Written(attend)
    found = record(model, torch.randn(2, LENGTH, WIDTH)).heads["root"]
    assert [head["entropy"] for head in found] == pytest.approx(
        torch.special.entr(model.p).sum(-1).mean((0, 2)).tolist(), rel=1e-4
    )


def test_a_log_softmax_alone_is_no_attention():
    """As of similarities, for a loss."""
    model, x = Written(lambda model, q, k, v: torch.log_softmax(q @ k.mT, -1) @ v), torch.randn(2, LENGTH, WIDTH)
    assert record(model, x).heads == {}


def test_so_they_are_in_place():
    model, x = Written(in_place), torch.randn(2, LENGTH, WIDTH)
    assert_close(record(model, x).heads["root"], per_head(logits(model, x)))


def test_exponentials_that_are_masked_are_read_as_they_are_used():
    def attend(model, q, k, v):
        e = torch.exp(q @ k.mT) * causal(LENGTH, LENGTH)
        return (e / e.sum(-1, keepdim=True)) @ v

    model, x = Written(attend), torch.randn(2, LENGTH, WIDTH)
    seen = record(model, x)
    q, k, _ = model.project(x)
    expected = per_head((q.double() @ k.double().mT).masked_fill(~causal(LENGTH, LENGTH), -math.inf))
    for found, right in zip(seen.heads["root"], expected, strict=True):
        for name in ("entropy", "max_probability", "distance", "normalized_entropy", "sink"):
            assert found[name] == pytest.approx(right[name], abs=1e-5)
    assert seen.uncovered == {}


# ---- what is not attention


def not_divided(model, q, k, v):
    return torch.exp(q @ k.mT) @ v


def divided_by_something_else(model, q, k, v):
    return (torch.exp(q @ k.mT) / q.sum(-1, keepdim=True)) @ v


def contrastive(model, q, k, v):
    e = torch.exp(q @ k.mT)
    return (e.diagonal(dim1=-2, dim2=-1) / e.sum(-1)).log()


def random_features(model, q, k, v):
    """As Performers have it: exponentials of features, whose products come before any sum."""
    omega = torch.ones(WIDTH // HEADS, 5)
    phi_q, phi_k = torch.exp(q @ omega), torch.exp(k @ omega)
    return (phi_q @ (phi_k.mT @ v)) / (phi_q @ phi_k.sum(-2).unsqueeze(-1))


def slots(model, q, k, v):
    weights = (q[:, :, :3] @ k.mT).softmax(-2)  # inputs choose among slots, and slots sum over inputs
    return (weights / weights.sum(-1, keepdim=True)) @ v


def router(model, q, k, v):
    return torch.einsum("bhqe,ed->bhqd", torch.einsum("bhqd,ed->bhqe", q, model.table).softmax(-1), model.table)


def router_first(model, q, k, v):
    return torch.einsum("bhqe,ed->bhqd", torch.einsum("ed,bhqd->bhqe", model.table, q).softmax(-1), model.table)


def channels_first_layer(model, q, k, v):
    return ((model.table @ q.mT).softmax(-2).mT) @ model.table  # over what the parameters span


@pytest.mark.parametrize(
    "attend",
    [
        *(not_divided, divided_by_something_else, contrastive, random_features, slots),
        *(router, router_first, channels_first_layer),
    ],
)
def test_a_look_alike_is_not_taken_for_attention(attend):
    seen = record(Written(attend), torch.randn(2, LENGTH, WIDTH))
    assert seen.heads == {}
    assert seen.uncovered == {}
