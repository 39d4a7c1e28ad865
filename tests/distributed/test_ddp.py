"""DistributedDataParallel: one run, with the numbers of one process on the joined batch."""

from __future__ import annotations

import pytest

from tests.distributed import training as t
from tests.distributed.compare import differences
from tests.distributed.launch import launch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch("tests.distributed.ddp_scenarios", 2, tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("how", ["plain", "static graph", "unused parameters", "bucket views", "model", "model before"])
def test_every_number_is_that_of_the_joined_batch(ranks, how):
    expected = t.alone([[t.tokens(k)] for k in range(t.STEPS)])
    assert differences(ranks[0][how], expected) == []


def test_only_rank_0_writes(ranks):
    assert set(ranks[1]["plain"]) == set()


def test_accumulation_without_a_reduction_metrics_and_validation(ranks):
    batches = [t.micro_batches(k) for k in range(t.STEPS)]
    expected = t.alone(batches, lambda model, k: t.validate(model, t.tokens(100 + k)))
    found = dict(ranks[0]["accumulated"])
    assert found.pop("mine/rank") == {"1": 0.0, "2": 0.0, "3": 0.0}  # what is logged by hand is rank 0's
    assert found.pop("mine/tensor") == {"1": 10.0, "2": 10.0, "3": 10.0}
    assert differences(found, expected) == []


def test_batches_of_unequal_size_weigh_what_they_hold(ranks):
    found = ranks[0]["unequal"]
    expected = t.alone([[t.tokens(k)] for k in range(t.STEPS)], lambda model, k: t.validate(model, t.tokens(100 + k)))
    first = [tag for tag in expected if tag.startswith(("activation_m", "activation_std", "attention_"))]
    assert len(first) > 30
    for tag in first:
        assert differences({tag: {"1": found[tag]["1"]}}, {tag: {"1": expected[tag]["1"]}}) == []


def test_a_pass_that_only_another_rank_has_made_is_in_the_record(ranks):
    found, model = ranks[0]["unequal"], t.transformer()
    means = {str(k + 1): model(t.tokens(100 + k)).mean().item() for k in range(t.STEPS)}
    assert found["val/activation_mean/head"] == pytest.approx(means, rel=1e-4)
    assert len([tag for tag in found if tag.startswith("val/activation_mean/")]) == 16


def test_every_branch_is_seen_whichever_rank_took_it(ranks):
    found = ranks[0]["forked"]
    assert {"activation_mean/branches.0", "activation_mean/branches.1", "activation_mean/head"} <= set(found)
    assert {"grad_norm/branches.0.weight", "grad_norm/branches.1.weight"} <= set(found)


def test_a_rank_that_stops_early_is_not_waited_for(ranks):
    assert set(ranks[0]["uneven"]["overview/grad_norm"]) == {"1", "2", "3", "4"}


def test_a_line_that_only_rank_0_runs_shows_rank_0(ranks):
    assert set(ranks[0]["only rank 0"]["overview/grad_norm"]) == {"1", "2", "3"}
