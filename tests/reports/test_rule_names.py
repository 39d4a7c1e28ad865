"""Rules and places of a user's own, whose names look like others or hold what Markdown and lines are made of."""

from __future__ import annotations

import pytest

import torchprobe
from torchprobe.reports.run import read_run
from torchprobe.reports.summary import summarise
from torchprobe.rules.alert import Display
from torchprobe.writers.event_file import EventFileWriter

NAMES = ["mine", "mine_too", "mine2", "a b", "a/b", "a\\b", "a\\_b", "*", "<b>", "has"]


def alerts_of(step, *, ended=False):
    for name in NAMES:
        yield torchprobe.Alert(
            name, step, f"at {name} of it", 1.0, None, f"says {name}", ended, advice="" if ended else f"try {name}"
        )


@pytest.fixture
def told(tmp_path):
    """What a report has of a run in which each rule fires at step 3 and ends at step 7."""
    writer, display = EventFileWriter(tmp_path), Display()
    for step in (3, 7):
        writer.write([torchprobe.Record(step, float(step), display.values([*alerts_of(step, ended=step == 7)]))])
    writer.close()
    return {alert["rule"]: alert for alert in summarise(read_run(tmp_path))["alerts"]}


@pytest.mark.parametrize("name", NAMES)
def test_each_rule_has_its_own_words_advice_and_episodes(told, name):
    found = told[name]
    assert found["said"].startswith(f"{name} has ended, step 7 at at {name} of it: says {name}")
    assert found["advice"] == f"try {name}"
    [episode] = found["episodes"]
    assert (episode["step"], episode["until"], episode["where"]) == (3, 7, f"at {name} of it")
    assert episode["message"].startswith(f"says {name}")
