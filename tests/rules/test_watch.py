"""Alerts on their way: once at the beginning, once at the end, to every place that asked for them."""

from __future__ import annotations

import cProfile
import logging
import pstats
import re
from pathlib import Path

import pytest

import torchprobe
from torchprobe.records import Record, Text
from torchprobe.rules.choosing import checked_rules
from torchprobe.rules.watch import open_watch
from torchprobe.rules.webhook import payload

DOCS = Path(torchprobe.__file__).parents[1] / "docs"


def too_high(record):
    loss = record.values.get("loss")
    if loss is None:
        return None
    return [torchprobe.Alert("too_high", record.step, None, loss, 1.0, "the loss is high")] if loss > 1 else []


def run(watch, losses):
    return [watch(Record(step, 0.0, {} if loss is None else {"loss": loss})) for step, loss in enumerate(losses, 1)]


def test_a_condition_is_said_when_it_begins_and_when_it_ends(caplog):
    watch = open_watch([too_high], None, None)
    records = run(watch, [0.5, 2.0, 3.0, None, 4.0, 0.5, 0.5, 2.0, 0.5, 0.5, None, 0.5, 0.5, 2.0])
    assert [(a.step, a.ended) for a in watch.alerts] == [(2, False), (13, True), (14, False)]
    assert [r.step for r in records if r.values.get("alerts/too_high") == 1.0] == [2, 14]
    assert [r.step for r in records if "alerts" in r.values] == [2, 13, 14]
    assert [r.values["overview/alerts"] for r in records if "overview/alerts" in r.values] == [1, 1, 2]
    assert str(watch.alerts[1]) == "too_high has ended, step 13: not seen any more; it began at step 2"
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 3


def illness(*places):
    """A rule whose one illness is at these places, a tuple a step."""
    return lambda record: [
        torchprobe.Alert("ill", record.step, ill[0], 0.0, 1.0, "it is ill", members=ill, advice="See a doctor.")
        for ill in places[record.step - 1 : record.step]
        if ill
    ]


def test_one_illness_of_many_members_is_one_alert_however_it_moves():
    watch = open_watch([illness(("b", "c"), ("a", "b"), (), ("c",), (), (), (), ())], None, None)
    run(watch, [0.0] * 8)
    assert [(a.step, a.where, a.members, a.ended) for a in watch.alerts] == [
        (1, "b", ("b", "c"), False),
        (8, "b", ("b", "c", "a"), True),
    ]


def test_what_to_try_stands_in_the_text_the_log_and_the_webhook(caplog):
    watch = open_watch([illness(("b.0", "b.1"))], None, None)
    [record] = run(watch, [0.0])
    said, advice = record.values["alerts"].markdown.splitlines()
    assert said == "- ill, step 1 at b.0 to b.1 (2 in all): it is ill (value 0, threshold 1)"
    assert advice == "    - See a doctor."
    assert "See a doctor." in caplog.text
    posted = payload(watch.alerts[0])
    assert posted["advice"] == "See a doctor."
    assert posted["members"] == ["b.0", "b.1"]
    assert "See a doctor." in posted["text"]


@pytest.mark.parametrize("rule", checked_rules(None), ids=lambda rule: rule.name)
def test_every_rule_says_what_it_means_what_to_try_and_where_that_is_from(rule):
    said, source = rule.advice.rsplit(" (", 1)
    assert len(re.findall(r"[.;]( |$)", f"{said}.")) >= 2
    assert source.endswith(").")
    assert re.search(r"\d{4}|PyTorch|docs|py-spy|CS231n", source)
    pages = (DOCS / "alerts.md").read_text() + (DOCS / "diagnoses.md").read_text()
    assert rule.advice.replace("\n", " ") in " ".join(pages.split())


def test_an_alert_is_one_line_that_names_everything():
    alert = torchprobe.Alert("dead_units", 7, "blocks.0.act", 0.75, 0.5, "units are\ndead")
    assert str(alert) == "dead_units, step 7 at blocks.0.act: units are dead (value 0.75, threshold 0.5)"
    watch = open_watch([lambda record: alert], None, None)
    text = watch(Record(7, 0.0, {})).values["alerts"]
    assert isinstance(text, Text)
    assert text.markdown == f"- {str(alert).replace('_', chr(92) + '_')}"


def test_a_user_callable_may_return_one_alert_a_generator_or_none():
    alert = torchprobe.Alert("mine", 1, None, 1.0, None, "m")
    for rule in (lambda r: alert, lambda r: iter([alert]), lambda r: (alert, alert)):
        watch = open_watch([rule], None, None)
        run(watch, [1.0, 1.0])
        assert watch.alerts == [alert]


def test_a_rule_that_fails_is_switched_off_alone(caplog):
    watch = open_watch([lambda record: 1 / 0, lambda record: ["text"], too_high], None, None)
    run(watch, [2.0, 2.0])
    assert [alert.rule for alert in watch.alerts] == ["too_high"]
    assert sum("is switched off" in r.getMessage() for r in caplog.records) == 2


@pytest.mark.parametrize("field", ["value", "threshold", "step"])
def test_a_rule_whose_number_is_none_is_switched_off_alone(field, caplog):
    fields = {"rule": "mine", "step": 1, "where": None, "value": 1.0, "threshold": 1.0, "message": "m", field: "high"}
    watch = open_watch([lambda record: torchprobe.Alert(**fields), too_high], None, None)
    run(watch, [2.0, 2.0])
    assert [alert.rule for alert in watch.alerts] == ["too_high"]
    assert "'high'" in watch.faults[0]


def test_what_on_alert_raises_is_logged_once(caplog):
    seen = []

    def callback(alert):
        seen.append(alert)
        raise OSError("no pager")

    watch = open_watch([too_high], callback, None)
    run(watch, [2.0, 0.0, 0.0, 0.0, 0.0, 2.0])
    assert len(seen) == 3
    assert sum("on_alert failed" in r.getMessage() for r in caplog.records) == 1


def test_stop_on_raises_once_at_the_check():
    watch = open_watch([too_high], None, {"too_high"})
    run(watch, [0.0])
    watch.check()
    run(watch, [2.0])
    with pytest.raises(torchprobe.TrainingAlert, match="the loss is high") as caught:
        watch.check()
    assert caught.value.alert.rule == "too_high"
    watch.check()


def test_many_alerts_of_a_step_are_few_lines_in_the_log(caplog):
    alerts = [torchprobe.Alert("vanishing", 1, f"layer{i}", 0.0, 1.0, "m") for i in range(200)]
    with caplog.at_level(logging.WARNING, "torchprobe"):
        watch = open_watch([lambda record: alerts], None, None)
        run(watch, [1.0])
    assert len(watch.alerts) == 200
    assert len(caplog.records) == 4
    assert "197 more" in caplog.records[-1].getMessage()


def test_the_count_stands_beside_the_other_counts_of_the_overview():
    watch = open_watch([], None, None)
    assert watch(Record(1, 0.0, {"overview/dropped_records": 0.0})).values["overview/alerts"] == 0


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ((["no_such"], None, None), ValueError, "'no_such'; takes non_finite, loss_spike"),
        (("non_finite", None, None), TypeError, "rules='non_finite': takes a list"),
        (([torchprobe.LossSpike], None, None), TypeError, r"write LossSpike\(\)"),
        (([3], None, None), TypeError, "rules: got 3"),
        ((None, "mail", None), TypeError, "on_alert='mail'"),
        ((None, None, {"no_such"}), ValueError, "stop_on: no rule of this run is called 'no_such'; takes at_chance"),
        ((["stalled"], None, {"non_finite"}), ValueError, "takes stalled"),
        ((None, None, "non_finite"), TypeError, "takes a set of rule names"),
        ((None, None, 3), TypeError, "stop_on=3"),
    ],
)
def test_a_wrong_argument_is_named(options, error, words):
    with pytest.raises(error, match=words):
        open_watch(*options)


MOST_CALLS = 210
"""Of Python and of C, that all rules make of the record of a step that nothing samples."""


def test_rules_cost_little_where_nothing_was_sampled():
    watch = open_watch(None, None, None)
    records = [
        Record(step, 0.0, {"overview/loss": 1 / step, "lr/SGD/group_0": 0.1, "performance/step_seconds": 0.1})
        for step in range(1, 101)
    ]
    for record in records[:50]:
        watch(record)
    with cProfile.Profile() as profile:
        for record in records[50:]:
            watch(record)
    assert pstats.Stats(profile).total_calls / 50 <= MOST_CALLS
