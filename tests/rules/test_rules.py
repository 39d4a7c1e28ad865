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


SPIKES = [("LossSpike", "train/loss"), ("GradNormSpike", "overview/grad_norm")]


@pytest.mark.parametrize(("rule", "tag"), SPIKES)
def test_one_value_spikes_above_four_times_the_window(rule, tag):
    make = getattr(torchprobe, rule)
    assert not warmed(make().watcher(), tag, 15)(Record(16, 0.0, {tag: 50.0}))
    assert not warmed(make().watcher(), tag, 128)(Record(129, 0.0, {tag: 4.15}))
    [alert] = warmed(make().watcher(), tag, 16)(Record(17, 0.0, {tag: 50.0}))
    assert (alert.rule, alert.step, alert.value) == (make.name, 17, 50.0)
    assert alert.threshold == pytest.approx(max(4 * 1.04, 0.2 * 50.0))
    assert make().watcher()(record(1, lr__SGD=0.1)) is None


@pytest.mark.parametrize(("rule", "tag"), SPIKES)
def test_four_values_running_spike_above_three_deviations(rule, tag):
    make = getattr(torchprobe, rule)
    watcher = warmed(make().watcher(), tag, 128)
    found = [watcher(Record(step, 0.0, {tag: 1.2})) for step in (129, 130, 131, 132)]
    assert [bool(those) for those in found] == [False, False, False, True]
    assert found[-1][0].threshold == pytest.approx(1.02 + 3 * 0.01 * math.sqrt(2), rel=1e-2)
    watcher = warmed(make().watcher(), tag, 128)
    assert not [1 for step in range(129, 140) if watcher(Record(step, 0.0, {tag: 1.2 if step % 4 else 1.0}))]


@pytest.mark.parametrize(("rule", "tag"), SPIKES)
def test_what_is_far_out_at_the_end_of_learning_may_be_next_to_nothing(rule, tag):
    watcher = getattr(torchprobe, rule)().watcher()
    course = [10.0 * 0.9**k for k in range(160)] + [1e-6 * (1 + 5e4 * (k in (9, 30, 31, 32, 33))) for k in range(60)]
    assert not [step for step, value in enumerate(course, 1) if watcher(Record(step, 0.0, {tag: value}))]


def test_a_loss_below_zero_does_not_spike_by_its_sign():
    watcher = torchprobe.LossSpike().watcher()
    assert not [k for k in range(1, 99) if watcher(record(k, train__loss=-5.0 + 0.1 * (k % 3)))]
    assert watcher(record(99, train__loss=50.0))


def test_each_set_of_optimizers_has_a_past_of_its_own():
    """A GAN: the critic's loss is a hundred times the generator's."""
    watcher = torchprobe.LossSpike().watcher()
    for step in range(1, 81):
        half = {"lr/Adam/group_0": 1e-3, "loss": 1.0} if step % 5 == 0 else {"lr/SGD/group_0": 1e-3, "loss": 0.01}
        assert not watcher(Record(step, 0.0, half))
    assert watcher(Record(81, 0.0, {"lr/SGD/group_0": 1e-3, "loss": 0.5}))


def test_the_norm_before_clipping_counts():
    rule = torchprobe.GradNormSpike().watcher()
    for step in range(1, 40):
        assert not rule(record(step, overview__grad_norm=1.0, overview__grad_norm_unclipped=2.0 + step % 2))
    assert rule(record(40, overview__grad_norm=1.0, overview__grad_norm_unclipped=90.0))[0].value == 90.0


def test_a_constant_loss_does_not_spike_by_rounding():
    rule = torchprobe.LossSpike(window=4).watcher()
    for step in range(1, 6):
        assert not rule(record(step, train__loss=0.3))
    assert not [step for step in range(6, 12) if rule(record(step, train__loss=0.3 + 1e-7))]
    rule = torchprobe.LossSpike(window=4).watcher()
    steps = [step for step in range(1, 12) if rule(record(step, train__loss=0.3 if step < 6 else 0.31))]
    assert steps == [9]


def test_the_users_own_loss_counts_before_the_one_that_was_found():
    rule = torchprobe.LossSpike(window=2).watcher()
    for step in range(1, 4):
        rule(record(step, train__loss=1.0, overview__loss=5.0))
    assert rule(record(4, train__loss=4.5))[0].value == 4.5


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


def test_overconfidence_adds_up_small_batches():
    batch = {"calibration__ece": 0.3, "calibration__count": 100.0}
    rule = torchprobe.Overconfidence().watcher()
    gaps = [0.9, 0.0, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2]  # the mean is 0.25
    found = [rule(record(step, **batch, calibration__confidence_gap=gap)) for step, gap in enumerate(gaps, 1)]
    assert found[:9] == [None] * 9
    assert found[9][0].value == pytest.approx(0.25)
    found = [rule(record(step, **batch, calibration__confidence_gap=0.05)) for step in range(11, 21)]
    assert [bool(those) for those in found] == [True] * 6 + [False] * 4
    assert rule(record(21, loss=1.0)) is None


def test_an_untrained_model_may_be_sure_of_itself():
    sure = {"calibration__confidence_gap": 0.9, "calibration__ece": 0.9, "calibration__count": 4096.0}
    rule = torchprobe.Overconfidence().watcher()
    assert [rule(record(step, lr__SGD=0.1, **sure)) for step in (1, 2, 5, 50)] == [None] * 4
    assert where(rule(record(100, lr__SGD=0.1, **sure))) == [None]


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
    assert where(rule(record(6, train__loss=math.nan, grad_nonfinite__z=1.0))) == [None, "b.ffn"]  # no other illness
    for step in (7, 8, 9, 10):
        assert rule(record(step, train__loss=1.0)) == []
    assert where(rule(record(11, grad_nonfinite__z=1.0))) == ["z"]


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
