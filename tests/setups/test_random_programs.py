"""Any model in any loop: every value in the step that made it, weights and random state as without torchprobe."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.setups.random_models import RECIPES
from tests.setups.random_programs import TURNS, run

PROGRAMS = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)


@PROGRAMS
@given(
    RECIPES,
    st.sampled_from(["sgd", "adam"]),
    st.integers(0, 2**20),
    st.lists(TURNS, min_size=2, max_size=5),
    st.sampled_from([[5], [2, 3], [1, 1, 3]]),
)
def test_values_are_those_of_their_step_and_training_is_bitwise_the_same(recipe, optimizer, seed, turns, sessions):
    bare = run(recipe, optimizer, seed, turns, [])
    assume(all(weight.abs().max() < 1e4 for weight in bare.weights))  # one that explodes: NaN equals nothing
    watched = run(recipe, optimizer, seed, turns, sessions)
    assert all(map(torch.equal, bare.weights, watched.weights))
    assert torch.equal(bare.random_state, watched.random_state)
    assert len(watched.truths) == len(watched.written) == len(turns)
    for truth, written in zip(watched.truths, watched.written, strict=True):
        for tag, value in truth.tags():
            assert written.get(tag) == pytest.approx(value, rel=2e-5, abs=2e-6), tag


@PROGRAMS
@given(
    RECIPES,
    st.sampled_from(["sgd", "adam"]),
    st.integers(0, 2**20),
    st.lists(TURNS, min_size=6, max_size=9),
    st.sampled_from(["", "weights", "head", "weights and head"]),
)
def test_the_loss_is_that_of_its_step_where_few_are_sampled(recipe, optimizer, seed, turns, beside):
    bare = run(recipe, optimizer, seed, turns, [], beside)
    assume(all(weight.abs().max() < 1e4 for weight in bare.weights))
    watched = run(recipe, optimizer, seed, turns, [len(turns)], beside, every=None)
    assert all(map(torch.equal, bare.weights, watched.weights))
    losses = [written.get("overview/loss") for written in watched.written]
    assert losses == pytest.approx([truth.loss for truth in watched.truths], rel=2e-5, abs=2e-6)
