"""One rule object in two runs, one after the other or at once: each has the alerts that it has by itself."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

import torchprobe
from torchprobe.records import Record, Text
from torchprobe.rules.watch import open_watch
from torchprobe.testing import MemoryWriter


def of(tag: str, *numbers: float) -> list[dict]:
    return [{tag: number} for number in numbers]


# rule, values of two runs step by step, and the steps at which alerts begin in each
RUNS = [
    (torchprobe.LossSpike(window=3), of("train/loss", 1, 1.1, 1, 9), of("train/loss", 100, 101, 100, 100), [4], []),
    (
        torchprobe.GradNormSpike(window=3),
        of("overview/grad_norm", 1, 1.1, 1, 9),
        of("overview/grad_norm", 100, 101, 100, 900),
        [4],
        [4],
    ),
    (
        torchprobe.ExplodingGradient(least=2),
        of("overview/grad_norm", 1, 1, 50, 1),
        of("overview/grad_norm", 100, 100, 50, 5000),
        [3],
        [4],
    ),
    (
        torchprobe.VanishingGradient(),
        [{"loss": 1e-3, "grad_mean_abs/fc": 1e-9}] * 2,
        [{"loss": 9.0}, {"loss": 1e-3, "grad_mean_abs/fc": 1e-9}],
        [1],
        [],
    ),
    (
        torchprobe.UpdateRatio(),
        [{"lr/SGD": 1e-6, "update_ratio/fc.weight": 5e-9}] * 2,
        [{"lr/SGD": 0.1}, {"lr/SGD": 1e-6, "update_ratio/fc.weight": 5e-9}],
        [1],
        [],
    ),
    (
        torchprobe.NonFinite(),
        [{"train/loss": math.nan}, {"val/loss": 1.0}, {"train/loss": 1.0}],
        of("train/loss", 1, 1, 1, math.nan),
        [1],
        [4],
    ),
    (
        torchprobe.NothingCaptured(),
        [{"nothing_captured/Attention": Text("Attention: none")}, {}],
        [{}, {}, {}],
        [1],
        [],
    ),
]
NAMES = [rule.name for rule, *_ in RUNS]


def begun(watch) -> list[int]:
    return [alert.step for alert in watch.alerts if not alert.ended]


def record(step: int, values: dict) -> Record:
    return Record(step, 0.0, values)


@pytest.mark.parametrize(("rule", "first", "second", "of_first", "of_second"), RUNS, ids=NAMES)
def test_one_after_the_other(rule, first, second, of_first, of_second):
    for values, expected in ((first, of_first), (second, of_second), (first, of_first)):
        watch = open_watch([rule], None, None)
        for step, those in enumerate(values, 1):
            watch(record(step, those))
        assert begun(watch) == expected


@pytest.mark.parametrize(("rule", "first", "second", "of_first", "of_second"), RUNS, ids=NAMES)
def test_at_once(rule, first, second, of_first, of_second):
    one, other = (open_watch([rule], None, None) for _ in range(2))
    for step in range(max(len(first), len(second))):
        for watch, values in ((one, first), (other, second)):
            if step < len(values):
                watch(record(step + 1, values[step]))
    assert (begun(one), begun(other)) == (of_first, of_second)


def test_a_run_that_stalls_beside_one_that_goes_on():
    now = [0.0]
    rule = torchprobe.Stalled(seconds=10.0, clock=lambda: now[0])
    still, moving = (open_watch([rule], None, None) for _ in range(2))
    still.follow_clock(lambda: "here", lambda: 0)
    moving.follow_clock(lambda: now[0], lambda: 0)
    for now[0] in (0.0, 8.0, 16.0):
        still.at_rest(), moving.at_rest()
    assert [alert.rule for alert in still.alerts] == ["stalled"]
    assert moving.alerts == []
    later = open_watch([rule], None, None)
    later.at_rest()
    assert later.alerts == []


def test_two_sessions_share_one_rule():
    rule = torchprobe.LossSpike(window=3)
    models = [nn.Linear(2, 1) for _ in range(2)]
    sessions = [torchprobe.instrument(model, writer=MemoryWriter(), probes=[], rules=[rule]) for model in models]
    for loss in (1.0, 1.1, 1.0, 5.0):
        for session, scale in zip(sessions, (1.0, 100.0), strict=True):
            session.log_metrics({"loss": torch.tensor(scale * loss)}, prefix="train")
            session.next_step()
    for session in sessions:
        session.detach()
    assert [[alert.value for alert in session.alerts] for session in sessions] == [[5.0], [500.0]]


@pytest.mark.parametrize("rule", [rule for rule, *_ in RUNS], ids=NAMES)
def test_a_rule_cannot_be_changed_and_shows_its_numbers(rule):
    for name in ("threshold", "window", "anything"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(rule, name, 1)
    assert rule == eval(repr(rule), vars(torchprobe))


def test_the_same_rule_twice_in_a_run_goes_on_with_two_states():
    rules = [torchprobe.LossSpike(window=2), torchprobe.LossSpike(window=4)]
    watch, resumed = open_watch(rules, None, None), open_watch(rules, None, None)
    for step in range(1, 5):
        watch(record(step, {"loss": 1.0 + step % 2}))
    resumed.load_state_dict(watch.state_dict())
    resumed(record(5, {"loss": 50.0}))
    assert [alert.message[-len("last 2 values") :] for alert in resumed.alerts] == ["last 2 values", "last 4 values"]


class Rising:
    """A user's configuration: the loss has risen so many times in a row."""

    name = "rising"

    def __init__(self, times: int) -> None:
        self.times = times

    def watcher(self):
        seen = []

        def watch(record):
            seen.append(record.values["loss"])
            last = seen[-self.times - 1 :]
            rises = len(last) > self.times and last == sorted(set(last))
            return torchprobe.Alert(self.name, record.step, None, last[-1], None, "rises") if rises else []

        return watch


def test_a_rule_of_ones_own_may_make_watchers_too():
    rule = Rising(times=2)
    for losses, steps in (((1.0, 2.0, 3.0), [3]), ((4.0, 5.0), []), ((2.0, 1.0, 2.0, 3.0), [4])):
        watch = open_watch([rule], None, {"rising"})
        for step, loss in enumerate(losses, 1):
            watch(record(step, {"loss": loss}))
        assert begun(watch) == steps


def test_a_watcher_that_cannot_be_called_is_refused():
    class Wrong:
        def watcher(self):
            return 3

    with pytest.raises(TypeError, match=r"Wrong\.watcher\(\) returned 3; takes a function of a record"):
        open_watch([Wrong()], None, None)
