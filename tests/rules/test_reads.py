"""A rule is asked only about records that hold what it reads, and finds what it would if it were asked about each."""

from __future__ import annotations

import math
from random import Random

import pytest

import torchprobe
from torchprobe.records import Record, Text
from torchprobe.rules.base import Diagnosis
from torchprobe.rules.choosing import checked_rules, watcher_of
from torchprobe.rules.diagnoses import DIAGNOSES
from torchprobe.rules.diagnoses.learning import AtChance, LearningRateTooHigh, LearningRateTooLow
from torchprobe.rules.diagnoses.optimizers import LearningRateDecaysEarly
from torchprobe.rules.watch import open_watch

QUICK = [  # what rules would say after hundreds of steps, after few
    torchprobe.LossSpike(window=3, least=2),
    torchprobe.GradNormSpike(window=3, least=2),
    torchprobe.ExplodingGradient(window=2, least=1),
    torchprobe.Overconfidence(predictions=2, untrained=4),
    torchprobe.Overfitting(validations=1),
    torchprobe.InputBound(samples=1),
    torchprobe.DeadUnits(samples=1),
    torchprobe.Stalled(seconds=1e9),
    AtChance(steps=1, targets=1),
    LearningRateTooHigh(samples=1, steps=1),
    LearningRateTooLow(steps=1),
]
FOLLOWERS = (AtChance, LearningRateTooHigh, LearningRateTooLow)  # of a loss, in steps that nothing samples, too
RULES = [*checked_rules(None), *QUICK]

LOSSES = ["overview/loss", "train/loss", "loss"]
IDLE = ["lr/SGD/group_0", "performance/step_seconds"]
VALIDATED = ["val/loss", "val/calibration/nll", "val/activation_nonfinite/fc"]
CALIBRATED = [f"calibration/{name}" for name in ("count", "confidence_gap", "ece", "nll")]
OVERVIEW = [f"overview/{name}" for name in ("grad_norm", "grad_norm_unclipped", "param_norm", "update_ratio")]
OVERVIEW += ["performance/input_wait_seconds"]
COUNTS = ["activation_nonfinite", "activation_grad_nonfinite", "grad_nonfinite", "gradients_nonfinite"]
NONFINITE = [f"{name}/fc" for name in (*COUNTS, "parameters_nonfinite")]
SIGNS = [f"nonfinite/{name}" for name in ("output", "gradient", "parameter")]
LAYERS = [f"{name}/fc" for name in ("grad_mean_abs", "grad_norm", "param_norm", "update_ratio", "dead_units")]
ATTENTION = [f"attention_{name}/fc" for name in ("entropy_min", "entropy", "entropy_normalized", "max_logit")]
TEXTS = ["provenance/fc", "provenance/(loss)", "nothing_captured/Attention", "nothing_captured/Routing"]
STRANGE = ["loss/fc", "lr", "evidence/fc", "evidence/", "grad_mean_abs", "val/lr/SGD", "overview/loss/fc"]
FACTS = sorted({rule.fact for rule in DIAGNOSES} - {"", "rows_unused"})
MORE = [
    "rate",
    "decay",
    "target_entropy",
    "cross_entropy",
    "counted",
    "targets",
    "classes",
    "symmetric",
    "empty_step/fc",
]
ROWS = ["rows_unused/fc", "rows_rare/fc", "rows/fc", "lookups/fc"]

NUMBERS = [0.0, 1e-9, 1e-3, 0.15, 0.5, 0.9, 1.0, 1.1, 2.0, 40.0, 2000.0, math.inf, math.nan]


def some(of: Random, *tags: str) -> dict:
    """Few or many of them, with a number each."""
    share = of.random()
    return {tag: of.choice(NUMBERS) for tag in tags if of.random() < share}


def each(of: Random, *tags: str) -> dict:
    """All of them."""
    return {tag: of.choice(NUMBERS) for tag in tags}


def values(of: Random) -> dict:
    """Of a step that nothing samples or that is sampled, of a validation, logged by the user, texts, or nothing."""
    kinds = [
        lambda: each(of, *IDLE, "overview/loss") | some(of, "train/loss", *SIGNS),
        lambda: some(of, *LOSSES, *STRANGE, "val/loss"),
        lambda: some(of, *VALIDATED) | each(of, *(f"val/{tag}" for tag in CALIBRATED)),
        lambda: dict.fromkeys(some(of, *TEXTS, *LOSSES, *IDLE), Text("told")),
        lambda: some(of, *LOSSES, *IDLE, *OVERVIEW, *CALIBRATED) | some(of, *LAYERS, *ATTENTION) | some(of, *NONFINITE),
        lambda: {},
    ]
    return of.choice(kinds)()


def evidence(of: Random) -> dict:
    """None, facts as they come, or those that go together."""
    return of.choice([dict, lambda: some(of, *FACTS, *MORE), lambda: each(of, *ROWS), lambda: each(of, *MORE)])()


class Always:
    """A watcher that is asked about every record, as a user's own is: a diagnosis says nothing about most."""

    def __init__(self, rule):
        self.name, self.patience, self.serious = rule.name, rule.patience, getattr(rule, "serious", True)
        self._rule, self._watcher = rule, watcher_of(rule)
        if hasattr(self._watcher, "state_dict"):
            self.state_dict = self._watcher.state_dict

    def __call__(self, record):
        by_losses = isinstance(self._rule, FOLLOWERS) and any(tag in record.values for tag in LOSSES)
        by_rates = isinstance(self._rule, LearningRateDecaysEarly) and record.group("lr")
        concerned = record.evidence or by_losses or by_rates or not isinstance(self._rule, Diagnosis)
        return self._watcher(record) if concerned else None


@pytest.mark.parametrize("seed", range(16))
def test_what_is_not_asked_would_not_have_answered(seed):
    of = Random(seed)
    watch, always = open_watch(RULES, None, None), open_watch([Always(rule) for rule in RULES], None, None)
    step = 1
    for _ in range(30):
        step = max(1, step + of.choice([1, 1, 1, 0, 9, -1]))  # several records of one step, one that comes late
        record = Record(step, 0.0, values(of), evidence=evidence(of))
        told = [one(record).values for one in (watch, always)]
        assert str(told[0]) == str(told[1])
        assert str(watch.state_dict()) == str(always.state_dict())  # NaN is not equal to itself
    assert str((watch.alerts, watch.remarks, watch.faults)) == str((always.alerts, always.remarks, always.faults))


def test_a_rule_of_ones_own_sees_every_record_whatever_its_attributes_mean():
    class Mine:
        reads = ()

        def __init__(self):
            self.seen = []

        def __call__(self, record):
            self.seen.append(record.step)

    mine = Mine()
    watch = open_watch([mine], None, None)
    for step in range(1, 4):
        watch(Record(step, 0.0, {}))
    assert mine.seen == [1, 2, 3]
