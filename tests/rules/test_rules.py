"""What each rule says about records, by hand: when it begins to hold, and when it is silent."""

from __future__ import annotations

import math

import pytest

import torchprobe
from torchprobe.records import Record, Text


def record(step: int, **values) -> Record:
    """Two underscores stand for a slash."""
    return Record(step, 0.0, {tag.replace("__", "/"): value for tag, value in values.items()})


def where(found) -> list:
    return [alert.where for alert in found or ()]


def warmed(rule, tag: str, steps: int):
    for step in range(1, steps + 1):
        assert not rule(Record(step, 0.0, {tag: 1.0 + 0.01 * (step % 5)}))
    return rule


@pytest.mark.parametrize(("rule", "tag"), [("LossSpike", "train/loss"), ("GradNormSpike", "overview/grad_norm")])
def test_a_spike_needs_a_full_window_and_six_deviations(rule, tag):
    make = getattr(torchprobe, rule)
    assert not warmed(make().watcher(), tag, 127)(Record(128, 0.0, {tag: 50.0}))
    [alert] = warmed(make().watcher(), tag, 128)(Record(129, 0.0, {tag: 50.0}))
    assert (alert.rule, alert.step, alert.value) == (make.name, 129, 50.0)
    assert alert.threshold == pytest.approx(1.02 + 6 * 0.01 * math.sqrt(2), rel=1e-2)
    assert make().watcher()(record(1, lr__SGD=0.1)) is None


def test_a_constant_loss_does_not_spike_by_rounding():
    rule = torchprobe.LossSpike(window=4).watcher()
    for step in range(1, 6):
        assert not rule(record(step, train__loss=0.3))
    assert not rule(record(6, train__loss=0.3 + 1e-7))
    assert rule(record(7, train__loss=0.31))


def test_the_users_own_loss_counts_before_the_one_that_was_found():
    rule = torchprobe.LossSpike(window=2).watcher()
    for step in range(1, 4):
        rule(record(step, train__loss=1.0, overview__loss=5.0))
    assert rule(record(4, train__loss=2.0))[0].value == 2.0


def test_exploding_is_ten_times_the_largest_seen():
    rule = warmed(torchprobe.ExplodingGradient().watcher(), "overview/grad_norm", 8)
    assert not rule(record(9, overview__grad_norm=10.0))
    assert rule(record(10, overview__grad_norm=101.0))[0].threshold == pytest.approx(100)
    assert not rule(record(11, overview__grad_norm=math.nan))


def test_vanishing_names_each_layer():
    rule = torchprobe.VanishingGradient().watcher()
    assert where(rule(record(2, grad_mean_abs__a=1e-9, grad_mean_abs__b=1e-3))) == ["a"]
    assert where(rule(record(3, grad_mean_abs__a=1e-3, grad_mean_abs__b=1e-3))) == []
    assert rule(record(4, train__loss=1.0)) is None


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


def test_attention_collapses_unless_there_is_one_key_only():
    rule = torchprobe.AttentionCollapse().watcher()
    values = {"attention_entropy_min__a": 0.05, "attention_entropy_min__b": 0.0, "attention_entropy_normalized__a": 0.1}
    assert where(rule(record(1, **values))) == ["a"]
    assert where(rule(record(2, attention_entropy_min__a=0.2, attention_entropy_normalized__a=0.1))) == []


def test_logit_growth_and_dead_units():
    growth = torchprobe.AttentionLogitGrowth().watcher()
    assert where(growth(record(1, attention_max_logit__a=101.0))) == ["a"]
    assert where(growth(record(1, attention_max_logit__a=100.0))) == []
    assert where(torchprobe.DeadUnits().watcher()(record(1, dead_units__a=0.51, dead_units__b=0.5))) == ["a"]


def test_update_ratio_out_of_range():
    ratios = {"update_ratio__a.w": 11.0, "update_ratio__b.w": 1e-9, "update_ratio__c.w": 1e-3}
    found = torchprobe.UpdateRatio().watcher()(record(2, **ratios, lr__SGD__group_0=1.0))
    assert where(found) == ["a.w", "b.w"]
    assert [alert.threshold for alert in found] == [10.0, 1e-8]


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


def test_overconfidence_needs_gap_error_and_predictions():
    sure = {"calibration__confidence_gap": 0.2, "calibration__ece": 0.2, "calibration__count": 1000.0}
    assert where(torchprobe.Overconfidence().watcher()(record(1, **sure))) == [None]
    assert torchprobe.Overconfidence().watcher()(record(1, **{**sure, "calibration__count": 999.0})) is None
    assert where(torchprobe.Overconfidence().watcher()(record(1, **{**sure, "calibration__ece": 0.1}))) == []
    assert where(torchprobe.Overconfidence().watcher()(record(1, **{f"val__{k}": v for k, v in sure.items()}))) == [
        "val"
    ]


def test_overfitting_needs_a_training_loss_that_falls_and_three_validations():
    def fired(losses, trained, tags=("train__loss", "val__loss")):
        rule = torchprobe.Overfitting().watcher()
        pairs = enumerate(zip(losses, trained, strict=True))
        return [i for i, (val, train) in pairs if rule(record(i, **{tags[0]: train, tags[1]: val}))]

    rising, falling = [1.0, 0.8, 1.0, 1.0, 1.0, 1.1], [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    assert fired(rising, falling) == [4, 5]
    assert fired(rising, falling, ("calibration__nll", "val__calibration__nll")) == [4, 5]
    assert fired(rising, [1.0, 0.9, 0.9, 0.9, 0.9, 0.9]) == []  # it does not learn
    assert fired([1.0, 0.8, 0.9, 0.9, 0.9, 0.95], falling) == []  # by less than a fifth
    assert fired([1.0, 0.8, 1.0, 1.0, 0.9, 1.1], falling) == []  # not in three running
    assert fired([-1.0, -2.0, -1.5, -1.5, -1.5, -1.5], falling) == [4, 5]
    assert torchprobe.Overfitting().watcher()(record(1, train__loss=1.0)) is None


def test_stalled_begins_after_half_an_hour_and_ends_with_the_next_step():
    now = [0.0]
    rule = torchprobe.Stalled(clock=lambda: now[0]).watcher()
    assert rule.at_rest(3, 3) == []
    now[0] = 1799.0
    assert rule.at_rest(3, 3) == []
    now[0] = 1801.0
    [alert] = rule.at_rest(3, 3)
    assert (alert.step, alert.threshold) == (3, 1800.0)
    assert rule.at_rest(4, 4) == []


def test_non_finite_names_what_it_knows_and_ends():
    rule = torchprobe.NonFinite().watcher()
    assert rule(record(1, train__loss=1.0)) == []
    [first] = rule(record(2, train__loss=math.nan))
    assert (first.where, first.message) == (None, "train/loss is nan")
    found = rule(Record(3, 0.0, {"provenance/b.ffn": Text("b.ffn produced inf"), "activation_nonfinite/b.ffn": 7.0}))
    assert where(found) == [None, "b.ffn"]
    assert found[1].value == 7.0
    assert where(rule(Record(4, 0.0, {"provenance/c": Text("another")}))) == [None, "b.ffn"]
    assert rule(Record(4, 0.0, {"val/x": 1.0})) is None  # logged later, of the same step
    assert rule(record(5, train__loss=1.0)) == []


def test_non_finite_says_since_when_it_may_be():
    rule = torchprobe.NonFinite().watcher()
    rule(record(100, activation_mean__a=1.0))
    assert "the last step without was 100" in rule(record(200, grad_nonfinite__a=3.0))[0].message


@pytest.mark.parametrize("tag", ["activation_nonfinite/m", "grad_nonfinite/m", "parameters_nonfinite/m"])
def test_every_kind_of_non_finite_number_counts(tag):
    [alert] = torchprobe.NonFinite().watcher()(Record(1, 0.0, {tag: 2.0}))
    assert (alert.where, alert.value) == ("m", 2.0)


def test_nothing_captured_says_which_and_why():
    [alert] = torchprobe.NothingCaptured().watcher()(
        Record(3, 0.0, {"nothing_captured/Gradients": Text("Gradients: why")})
    )
    assert (alert.where, alert.message) == ("Gradients", "Gradients: why")


@pytest.mark.parametrize(
    ("make", "options"),
    [
        ("LossSpike", {"deviations": 0}),
        ("LossSpike", {"window": 0}),
        ("DeadUnits", {"threshold": -1}),
        ("UpdateRatio", {"high": math.nan}),
        ("Stalled", {"seconds": math.inf}),
    ],
)
def test_a_threshold_that_makes_no_sense_is_refused(make, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        getattr(torchprobe, make)(**options)


@pytest.mark.parametrize(
    ("rule", "before", "after"),
    [
        (
            "UpdateRatio",
            {"lr__SGD": 0.1},
            {"lr__SGD": 1e-6, "update_ratio__fc.weight": 5e-9, "grad_norm__fc.weight": 1.0},
        ),
        ("VanishingGradient", {"loss": 9.0}, {"loss": 1e-3, "grad_mean_abs__fc": 1e-9}),
    ],
)
def test_what_was_healthy_before_a_resumption_is_healthy_after_it(rule, before, after):
    """The end of a schedule, and of learning, is known by what was larger earlier."""
    make = getattr(torchprobe, rule)()
    first, resumed = make.watcher(), make.watcher()
    first(record(1, **before))
    assert resumed(record(2, **after)), "by itself it is ill"
    resumed = make.watcher()
    resumed.load_state_dict(first.state_dict())
    assert not resumed(record(2, **after))
