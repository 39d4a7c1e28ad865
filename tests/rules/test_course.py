"""What the rules of a run's course say about records, by hand: when they begin to hold, and when they are silent."""

from __future__ import annotations

import math

import pytest

import torchprobe
from tests.rules.records import record, where
from torchprobe.records import Record


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
