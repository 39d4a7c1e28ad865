"""Norms of what stepped are compared parameter by parameter: phases and players of a game train different ones."""

from __future__ import annotations

import dataclasses
import math

from tests.rules.records import record
from torchprobe.rules.diagnoses.learning import LearningRateTooHigh, WeightDecayTooLarge

TOO_HIGH = LearningRateTooHigh(ratio=0.05, steps=1)
TOO_LARGE = WeightDecayTooLarge()


def said(rule, course):
    """What a rule says about a run of which every fourth step is sampled. course: the norms and the loss of a step."""
    watcher, found = rule.watcher(), []
    for step in range(1, 80, 4):
        norms, loss = course(step)
        values = {f"param_norm__{name}": norm for name, norm in norms.items()}
        now = record(step, **values, overview__param_norm=math.hypot(*norms.values()), overview__loss=loss)
        found += watcher(dataclasses.replace(now, evidence={"decay": 0.1, "rate": 0.1})) or []
    return found


def risen(step):
    return 1.0 if step == 1 else 9.0


def test_other_parameters_norms_are_no_course_of_the_first_ones():
    assert said(TOO_LARGE, lambda k: ({"a": 1.0} if k < 40 else {"b": 0.1}, 1.0)) == []
    assert said(TOO_HIGH, lambda k: ({"a": 1.0} if k < 40 else {"b": 1e9}, risen(k))) == []
    assert said(TOO_HIGH, lambda k: ({"a": 1.0} if k % 8 == 1 else {"b": 9.0}, risen(k))) == []


def test_what_joins_or_takes_turns_hides_no_course():
    assert said(TOO_LARGE, lambda k: ({"a": 1.0} if k < 40 else {"a": 1.0, "b": 9 * 0.9 ** (k - 40)}, 1.0))
    assert said(TOO_LARGE, lambda k: ({"a": 1.0} if k % 8 == 1 else {"b": 0.9**k}, 1.0))
    assert said(TOO_HIGH, lambda k: ({"a": 1.0} if k % 8 == 1 else {"b": 2.0**k}, risen(k)))
    assert said(TOO_HIGH, lambda k: ({"a": 2.0**k} | ({"b": 1.0} if k > 40 else {}), risen(k)))
