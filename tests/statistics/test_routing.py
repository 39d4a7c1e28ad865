"""Shares of experts, and whether weights are those of the logits: against a float64 twin, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchprobe.statistics import routing

SIZES = {"tokens": st.integers(1, 9), "experts": st.integers(3, 6), "k": st.integers(1, 2), "seed": st.integers(0, 99)}


def columns(rows):
    return dict(zip(routing.FIELDS, rows.T.tolist(), strict=True))


def softmax(logits):
    largest = max(logits)
    powers = [math.exp(x - largest) for x in logits]
    return [p / sum(powers) for p in powers]


def sigmoid(logits):
    shares = [1 / (1 + math.exp(-x)) for x in logits]
    return [s / sum(shares) for s in shares]


def twin(logits, chosen):
    """Taken, dropped, and both masses, in Python."""
    experts = len(logits[0])
    taken = [sum(row.count(e) for row in chosen) for e in range(experts)]
    dropped = sum(all(not 0 <= e < experts for e in row) for row in chosen)
    masses = [[sum(of(row)[e] for row in logits) for e in range(experts)] for of in (softmax, sigmoid)]
    return taken, dropped, *masses


def made(tokens, experts, k, seed, share, dtype=torch.float32):
    """Logits, weights and choices as routers make them."""
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)).mul(2).to(dtype)
    top, chosen = share(logits.float()).topk(k)
    return logits, top, chosen


@pytest.mark.parametrize(("share", "fits"), [(lambda x: x.softmax(-1), "softmax"), (torch.sigmoid, "sigmoid")])
@given(**SIZES, normalised=st.booleans())
@settings(max_examples=40, deadline=None)
def test_rows_are_those_of_a_slow_twin(share, fits, tokens, experts, k, seed, normalised):
    logits, weights, chosen = made(tokens, experts, k, seed, share)
    weights = weights / weights.sum(-1, keepdim=True) * 2.5 if normalised else weights
    found = columns(routing.of_choices(logits, weights, chosen))
    taken, dropped, soft, sig = twin(logits.double().tolist(), chosen.tolist())
    assert (found["taken"], found["dropped"], found["tokens"]) == (taken, [dropped] * experts, [tokens] * experts)
    assert found["softmax_mass"] == pytest.approx(soft, rel=1e-5)
    assert found["sigmoid_mass"] == pytest.approx(sig, rel=1e-5)
    assert found[f"{fits}_fits"] == [tokens] * experts


@given(**SIZES)
@settings(max_examples=40, deadline=None)
def test_parts_of_unequal_size_add_up(tokens, experts, k, seed):
    logits, weights, chosen = made(tokens + 3, experts, k, seed, lambda x: x.softmax(-1))
    whole = routing.of_choices(logits, weights, chosen)
    parts = [routing.of_choices(*(x[some] for x in (logits, weights, chosen))) for some in (slice(3), slice(3, None))]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=1e-6)


def test_weights_of_other_logits_fit_no_reading():
    logits, weights, chosen = made(50, 6, 2, 0, lambda x: x.softmax(-1))
    found = columns(routing.of_choices(logits.roll(1, 0), weights, chosen))
    assert found["softmax_fits"][0] < 5 > found["sigmoid_fits"][0]


def test_the_two_readings_are_told_apart():
    for share, name, other in ((torch.sigmoid, "sigmoid", "softmax"), (lambda x: x.softmax(-1), "softmax", "sigmoid")):
        found = columns(routing.of_choices(*made(50, 6, 2, 0, share)))
        assert (found[f"{name}_fits"][0], found[f"{other}_fits"][0] < 5) == (50, True)


def test_half_precision_fits_within_its_rounding():
    logits, weights, chosen = made(200, 6, 2, 0, lambda x: x.softmax(-1), torch.bfloat16)
    assert columns(routing.of_choices(logits, weights.bfloat16(), chosen))["softmax_fits"][0] == 200


def test_a_number_that_is_no_experts_is_a_dropped_choice():
    logits, weights, chosen = made(4, 3, 2, 0, lambda x: x.softmax(-1))
    chosen[0], chosen[1, 0] = 3, 3
    found = columns(routing.of_choices(logits, weights, chosen))
    assert (found["dropped"][0], sum(found["taken"]), found["softmax_fits"][0]) == (1, 5, 4)


def test_a_capacity_drops_tokens():
    """As the Switch transformer routes: one expert a token, two tokens an expert."""
    logits = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    weights, best = logits.softmax(-1).max(-1, keepdim=True)
    mask = torch.nn.functional.one_hot(best.squeeze(-1), 3)
    mask = mask * (mask.cumsum(0) <= 2)
    found = columns(routing.of_mask(logits, weights, mask))
    assert (found["taken"], found["dropped"], found["softmax_fits"]) == ([2, 2, 2], [14] * 3, [20] * 3)
    assert columns(routing.of_mask(logits.roll(1, 0), weights, mask))["softmax_fits"][0] < 5
