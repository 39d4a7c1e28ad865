"""DistributedDataParallel: one run, with the numbers of one process on the joined batch."""

from __future__ import annotations

import pytest

from tests.distributed import predicting as p
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


@pytest.mark.parametrize("how", ["clipped", "clipped views"])
def test_the_norm_before_clipping_is_that_of_the_reduced_gradients(ranks, how):
    expected = t.alone([[t.tokens(k)] for k in range(t.STEPS)], limit=t.LIMIT)
    assert expected["overview/clipped_fraction"] == dict.fromkeys("123", 1.0)
    assert differences(ranks[0][how], expected) == []


def test_times_are_the_largest_and_rates_the_sum(ranks):
    found = ranks[0]["timed"]
    assert found["performance/step_seconds"] == {"2": 2.0, "3": 2.0, "4": 2.0}
    assert found["performance/forward_seconds"] == {"1": 2.0, "2": 2.0, "4": 2.0}
    assert found["performance/examples_per_second"] == {"2": 4.0 + 2.0, "4": 4.0 + 2.0}
    assert found["performance/input_wait_seconds"] == {"2": 0.0, "4": 0.0}
    assert ranks[1]["timed"] == {}


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


EVERYTHING = slice(None)
PREDICTIONS = ("calibration", "uncertainty", "overview/ece", "overview/epistemic", "overview/aleatoric")


def test_every_default_probe_says_of_an_ensemble_what_it_says_of_the_joined_batch(ranks):
    expected = p.classify(EVERYTHING)
    found = dict(ranks[0]["classified"])
    shares = [tag for tag in expected if tag.startswith("dead_units/")]
    assert shares
    for tag in shares:  # a mean over ranks, each over its own inputs
        of_ranks, joined = found.pop(tag), expected.pop(tag)
        assert of_ranks.keys() == joined.keys()
        assert all(0 <= share <= 1 for share in of_ranks.values())
    assert len(p.tags_of(expected, PREDICTIONS)) >= 40
    assert differences(found, expected) == []


def test_calibration_and_uncertainty_weigh_examples_and_not_ranks(ranks):
    found, expected = (p.tags_of(run, PREDICTIONS) for run in (ranks[0]["classified, unequal"], p.classify(EVERYTHING)))
    assert set(found) == set(expected)
    first = {tag: {"1": steps["1"]} for tag, steps in found.items() if not tag.startswith("val/")}
    assert differences(first, {tag: {"1": expected[tag]["1"]} for tag in first}) == []  # weights differ from then on
    counts = {tag: steps for tag, steps in expected.items() if tag.endswith("calibration/count")}
    assert differences({tag: found[tag] for tag in counts}, counts) == []
    assert counts["val/calibration/count"] == {"1": 192, "2": 192, "3": 192}


def test_predictions_that_every_rank_hands_in_are_judged_together(ranks):
    found, expected = (
        p.tags_of(run, PREDICTIONS)
        for run in (ranks[0]["predictions given"], p.classify(EVERYTHING, log_predictions=True))
    )
    assert differences(found, expected) == []


def test_coverage_of_a_regression_is_that_of_the_joined_batch(ranks):
    expected = p.regress(EVERYTHING)
    assert {"calibration/coverage_50", "calibration/coverage_90", "calibration_pit/targets"} <= set(expected)
    assert differences(ranks[0]["regressed"], expected) == []


def test_every_rank_settles_on_what_the_outputs_are(ranks):
    """Else the others would judge outputs in every way there is, at each sampled step, and rank 0 would wait."""
    expected = p.settle(EVERYTHING)["judged"]
    assert expected[0] == ["softmax-1", "sigmoid-1"]
    assert expected[-1] == ["softmax-1"]
    assert [rank["settled"]["judged"] for rank in ranks] == [expected, expected]


@pytest.mark.parametrize("how", ["settled", "never settled"])
def test_what_is_settled_and_what_is_not_is_that_of_the_joined_batch(ranks, how):
    expected = p.settle(EVERYTHING, classes=how == "settled")
    assert differences(ranks[0][how]["values"], expected["values"]) == []
    assert ranks[0][how]["missed"] == expected["missed"]
    assert ("calibration/ece" in expected["values"], len(expected["missed"])) == (
        (True, 0) if how == "settled" else (False, 2)
    )
