"""What all rules have in common: thresholds, memory, words."""

from __future__ import annotations

import math

import pytest

import torchprobe
from tests.rules.records import record
from torchprobe.records import Record, Text


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
