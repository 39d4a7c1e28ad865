"""What is said of numbers that are not finite, and when it ends."""

from __future__ import annotations

import math

import pytest

import torchprobe
from tests.rules.records import record, where
from torchprobe.records import Record, Text


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
