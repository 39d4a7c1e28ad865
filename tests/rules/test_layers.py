"""What the rules of single layers say about records, by hand: when they begin to hold, and when they are silent."""

from __future__ import annotations

import pytest

import torchprobe
from tests.rules.records import record, where
from torchprobe.records import Record


def test_vanishing_names_each_layer():
    rule = torchprobe.VanishingGradient().watcher()
    assert where(rule(record(2, grad_mean_abs__a=1e-9, grad_mean_abs__b=1e-3))) == ["a"]
    assert where(rule(record(3, grad_mean_abs__a=1e-3, grad_mean_abs__b=1e-3))) == []
    assert rule(record(4, train__loss=1.0)) is None


def test_a_bias_that_rests_beside_a_weight_made_of_other_parameters_is_no_illness():
    """As the last one under a hinge loss and spectral normalisation, which real and made-up data pull both ways."""
    vanishing, update = torchprobe.VanishingGradient().watcher(), torchprobe.UpdateRatio().watcher()
    weight = "parametrizations.weight"
    assert where(vanishing(record(2, **{"grad_mean_abs__a": 0.0, f"grad_mean_abs__a.{weight}": 0.1}))) == []
    assert where(vanishing(record(3, **{"grad_mean_abs__a": 0.0, f"grad_mean_abs__ab.{weight}": 0.1}))) == ["a"]
    assert where(vanishing(record(4, **{"grad_mean_abs__a": 0.1, f"grad_mean_abs__a.{weight}": 0.0}))) == [
        f"a.{weight}"
    ]
    ratios = {"update_ratio__a.bias": 0.0, f"update_ratio__a.{weight}.original": 0.1, "lr__SGD__group_0": 1.0}
    assert where(update(record(2, **ratios))) == []
    assert where(update(record(3, **{**ratios, f"update_ratio__a.{weight}.original": 0.0}))) != []


def test_a_gradient_that_is_zero_at_the_first_step_only_is_no_illness():
    rule = torchprobe.VanishingGradient().watcher()
    assert where(rule(record(1, grad_mean_abs__a=0.0, grad_mean_abs__b=1.0))) == []
    assert where(rule(record(2, grad_mean_abs__a=0.0, grad_mean_abs__b=1.0))) == ["a"]


def test_a_converged_model_has_no_vanishing_gradient():
    rule = torchprobe.VanishingGradient().watcher()
    rule(record(1, train__loss=1.0, grad_mean_abs__a=1.0))
    assert where(rule(record(2, train__loss=1e-6, grad_mean_abs__a=1e-9))) == []
    assert where(rule(record(3, train__loss=0.5, grad_mean_abs__a=1e-9))) == ["a"]
    assert where(rule(record(4, train__loss=1e-6, grad_mean_abs__a=1e-9, grad_mean_abs__b=1e-3))) == ["a"]


def test_nothing_has_to_move_in_a_converged_model():
    rule = torchprobe.UpdateRatio().watcher()
    still = {"update_ratio__a.w": 0.0, "lr__LBFGS__group_0": 1.0}
    assert where(rule(record(2, train__loss=1.0, grad_mean_abs__a=1.0, **still))) == ["a.w"]
    assert where(rule(record(3, train__loss=1e-6, grad_mean_abs__a=1e-6, **still))) == []
    assert where(rule(record(4, train__loss=1e-6, grad_mean_abs__a=1e-3, **still))) == ["a.w"]
    assert where(rule(record(5, train__loss=0.5, grad_mean_abs__a=1e-6, **still))) == ["a.w"]
    assert where(rule(record(6, train__loss=1e-6, **still))) == ["a.w"]


def test_attention_collapses_unless_there_is_one_key_only():
    rule = torchprobe.AttentionCollapse().watcher()
    values = {"attention_entropy_min__a": 0.05, "attention_entropy_min__b": 0.0, "attention_entropy_normalized__a": 0.1}
    assert where(rule(record(1, **values))) == ["a"]
    assert where(rule(record(2, attention_entropy_min__a=0.2, attention_entropy_normalized__a=0.1))) == []


def test_logit_growth():
    growth = torchprobe.AttentionLogitGrowth().watcher()
    assert where(growth(record(1, attention_max_logit__a=101.0))) == ["a"]
    assert where(growth(record(1, attention_max_logit__a=100.0))) == []


def test_units_are_dead_in_three_samples_running_and_until_far_fewer_are():
    dead = torchprobe.DeadUnits().watcher()
    shares = [0.51, 0.3, 0.51, 0.6, 0.7, 0.45, 0.41, 0.39, 0.45, 0.6]
    found = [where(dead(record(step, dead_units__a=a, dead_units__b=0.5))) for step, a in enumerate(shares, 1)]
    assert found == [[]] * 4 + [["a"]] * 3 + [[]] * 3
    assert dead(record(11, loss=1.0)) is None


def test_update_ratio_out_of_range():
    ratios = {"update_ratio__a.w": 11.0, "update_ratio__b.w": 1e-9, "update_ratio__c.w": 1e-3}
    found = torchprobe.UpdateRatio().watcher()(record(2, **ratios, lr__SGD__group_0=1.0))
    assert where(found) == ["a.w", "b.w"]
    assert [alert.threshold for alert in found] == [10.0, 1e-8]


def test_a_step_that_is_too_large_at_the_first_step_has_to_come_again():
    rule = torchprobe.UpdateRatio().watcher()
    assert where(rule(record(1, **{"update_ratio__a.w": 50.0}))) == []
    assert where(rule(record(2, **{"update_ratio__a.w": 50.0}))) == ["a.w"]


def test_nothing_has_to_move_at_a_ten_thousandth_of_the_largest_rate():
    rule = torchprobe.UpdateRatio().watcher()
    rule(record(2, **{"update_ratio__a.w": 1e-3, "lr__SGD__group_0": 1.0}))
    assert where(rule(record(3, **{"update_ratio__a.w": 1e-14, "lr__SGD__group_0": 1e-5}))) == []
    assert where(rule(record(4, **{"update_ratio__a.w": 1e-14, "lr__SGD__group_0": 1e-3}))) == ["a.w"]


def course_of(rule, *steps):
    """Where each of these steps is ill, the first being step 1; `a` has no gradient in any of them."""
    watcher = rule.watcher()
    still = {"grad_mean_abs/a": 0.0, "grad_norm/a.w": 0.0, "update_ratio/a.w": 0.0, "param_norm/a.w": 1.0}
    still |= {"grad_norm/b.w": 1.0, "grad_mean_abs/b": 1.0}
    return [where(watcher(Record(step, 0.0, still | values))) for step, values in enumerate(steps, 1)]


BEGINNING = [(torchprobe.VanishingGradient(), "a"), (torchprobe.UpdateRatio(), "a.w")]


@pytest.mark.parametrize(("rule", "name"), BEGINNING, ids=lambda x: getattr(x, "name", None))
def test_no_gradient_is_how_a_model_begins_until_something_has_moved(rule, name):
    still, moving, last = {"lr/SGD": 0.0}, {"lr/SGD": 0.1, "update_ratio/b.w": 0.1}, {"lr/SGD": 0.1}
    assert course_of(rule, still, still, still, moving, last) == [[], [], [], [], [name]]
    assert course_of(rule, moving, last) == [[], [name]]


@pytest.mark.parametrize(("rule", "name"), BEGINNING, ids=lambda x: getattr(x, "name", None))
def test_no_gradient_comes_through_a_weight_that_is_zero_and_about_to_move(rule, name):
    """Another group moves from the beginning; the one of the zero weight waits, and its first step is the third."""
    rate = {"lr/SGD/group_0": 0.1, "lr/SGD/group_1": 0.0}
    zero, moved = {**rate, "param_norm/b.w": 0.0}, {**rate, "param_norm/b.w": 0.1}
    assert course_of(rule, zero, zero, moved, moved) == [[], [], [], [name]]
    frozen = {**zero, "grad_norm/b.w": 0.0}
    assert course_of(rule, frozen, frozen) == [[], [name]]


@pytest.mark.parametrize(
    "values",
    [
        {"update_ratio__a.w": 0.0, "lr__SGD__group_0": 0.0},
        {"update_ratio__a.bias": 1e-12, "update_ratio__a.weight": 1e-3},
        {"update_ratio__a.bias": 100.0, "param_norm__a.bias": 0.01, "overview__param_norm": 5.0},
        {"update_ratio__a.w": 0.0, "grad_nonfinite__a": 3.0},
        {"update_ratio__a.w": 0.0, "grad_norm__b.w": 1.0},
    ],
    ids=[
        "rate 0",
        "the other parameter of the module moves",
        "a bias passes through zero",
        "NaN is the illness",
        "frozen",
    ],
)
def test_update_ratios_that_are_healthy(values):
    assert not torchprobe.UpdateRatio().watcher()(record(5, **values))


def test_no_update_from_no_gradient_at_the_first_step_is_how_lora_begins():
    still = {"update_ratio__a.w": 0.0, "grad_norm__a.w": 0.0}
    rule = torchprobe.UpdateRatio().watcher()
    assert where(rule(record(1, **still))) == []
    assert where(rule(record(2, **still))) == ["a.w"]
    assert where(rule(record(1, **{**still, "grad_norm__a.w": 1.0}))) == ["a.w"]


def test_a_small_update_is_measured_at_full_learning_rate():
    rule = torchprobe.UpdateRatio().watcher()
    assert not rule(record(2, update_ratio__a=1e-4, lr__SGD__group_0=1.0))
    assert not rule(record(3, update_ratio__a=5e-9, lr__SGD__group_0=1e-3))
    assert where(rule(record(4, update_ratio__a=5e-9, lr__SGD__group_0=1.0))) == ["a"]


def growing_from_zero(rule, ratio):
    """Where steps 1 to 3 are ill: `a` had no gradient at step 1, as the weight behind it was zero; then a small one."""
    watcher = rule.watcher()
    begins = {"grad_norm__a.w": 0.0, "grad_mean_abs__a": 0.0, "update_ratio__a.w": 0.0, "param_norm__a.w": 1.0}
    begins |= {"grad_norm__b.w": 1.0, "grad_mean_abs__b": 1.0, "param_norm__b.w": 1e-6}
    small = {"grad_norm__a.w": 1e-9, "grad_mean_abs__a": 1e-10, "update_ratio__a.w": 1e-10, "update_ratio__b.w": ratio}
    steps = begins, begins | small, begins | small | {"update_ratio__b.w": 1e-4}
    return [where(watcher(record(step, **values))) for step, values in enumerate(steps, 1)]


@pytest.mark.parametrize(("rule", "name"), BEGINNING, ids=lambda x: getattr(x, "name", None))
def test_little_gradient_comes_through_a_weight_that_grows_out_of_zero(rule, name):
    assert growing_from_zero(rule, 0.5) == [[], [], [name]]
    assert growing_from_zero(rule, 1e-4) == [[], [name], [name]]


def test_a_second_optimizers_parameters_begin_with_its_own_first_step():
    """A generator that ends in a weight of zero, and steps after its critic; the critic's steps tell nothing of it."""
    critic = {"grad_mean_abs__c": 1.0, "grad_norm__c.w": 1.0, "param_norm__c.w": 1.0}
    first = {"grad_mean_abs__a": 0.0, "grad_norm__a.w": 0.0, "param_norm__a.w": 1.0, "grad_norm__b.w": 1.0}
    zero, moved = {**first, "param_norm__b.w": 0.0}, {**first, "param_norm__b.w": 0.1}
    rule = torchprobe.VanishingGradient().watcher()
    course = [critic, zero, critic, zero, critic, moved, critic, moved]
    found = [where(rule(record(step, **values))) for step, values in enumerate(course, 1)]
    assert found == [[], [], [], [], [], [], [], ["a"]]
