"""What a rule, on_alert or a follower raises ends that one alone: it is said once, and can be asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchprobe
from torchprobe.records import Record
from torchprobe.rules.watch import open_watch
from torchprobe.testing import MemoryWriter

KINDS = [(SystemExit(3), "exit"), (KeyboardInterrupt(), "interrupt"), (GeneratorExit(), ""), (ValueError("no"), "no")]
kinds = pytest.mark.parametrize(("error", "word"), KINDS, ids=[type(error).__name__ for error, _ in KINDS])


def always(record):
    return [torchprobe.Alert("always", record.step, None, 1.0, 0.5, "m")]


def at_each(record):
    return [torchprobe.Alert("at_each", record.step, f"step {record.step}", 1.0, 0.5, "m")]


def run(watch, steps: int = 3) -> list[Record]:
    records = [watch(Record(step, 0.0, {})) for step in range(1, steps + 1)]
    watch.at_rest()
    watch.close()
    return records


def said(caplog, what: str, error: BaseException, word: str) -> bool:
    """One line of the log, with what failed, the exception's type and the word."""
    [line] = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    return line.startswith(f"{what} failed") and type(error).__name__ in line and word in line and "\n" not in line


class Breaks:
    """A rule, on_alert or follower of which one method raises."""

    name = "breaks"

    def __init__(self, method: str, error: BaseException) -> None:
        self.method, self.error, self.calls = method, error, []

    def did(self, method: str) -> None:
        self.calls.append(method)
        if method == self.method:
            raise self.error

    def __call__(self, record_or_alert):
        self.did("call")

    def at_rest(self, *arguments):
        self.did("at_rest")

    def follow(self, record, alerts):
        self.did("follow")

    def crashed(self, error):
        self.did("crashed")

    def close(self):
        self.did("close")

    def state_dict(self):
        self.did("state_dict")


@kinds
@pytest.mark.parametrize("method", ["call", "at_rest"])
def test_a_rule(caplog, error, word, method):
    rule = Breaks(method, error)
    watch = open_watch([rule, always], None, None)
    run(watch)
    watch.at_rest()
    assert rule.calls.count(method) == 1
    assert [alert.rule for alert in watch.alerts] == ["always"]
    assert said(caplog, "rule breaks", error, word)
    [fault] = watch.faults
    assert fault.startswith(f"rule breaks: {type(error).__name__}")
    assert word in fault


def test_a_rule_that_changes_the_record_it_gets_changes_no_other():
    watch = open_watch([lambda record: record.values.clear(), always], None, None)
    record = watch(Record(1, 0.0, {"loss": 1.0}))
    assert record.values["loss"] == 1.0
    watch.close()


@kinds
def test_a_rule_that_is_a_generator(caplog, error, word):
    def broken(record):
        yield from always(record)
        raise error

    watch = open_watch([broken, at_each], None, None)
    run(watch)
    assert {alert.rule for alert in watch.alerts} == {"at_each"}
    assert said(caplog, "rule broken", error, word)


@kinds
def test_on_alert_is_asked_again(caplog, error, word):
    callback = Breaks("call", error)
    watch = open_watch([at_each], callback, None)
    records = run(watch)
    assert [record.values["alerts/at_each"] for record in records] == [1.0] * 3
    assert callback.calls == ["call"] * 3 + ["close"]
    assert said(caplog, "on_alert", error, word)
    assert len(watch.faults) == 1


@kinds
def test_a_notifier_that_cannot_be_closed(caplog, error, word):
    watch = open_watch([always], Breaks("close", error), None)
    run(watch)
    assert said(caplog, "on_alert.close", error, word)
    assert len(watch.faults) == 1


@kinds
@pytest.mark.parametrize("method", ["follow", "at_rest", "close"])
def test_a_follower(caplog, error, word, method):
    watch = open_watch([at_each], None, None)
    broken, healthy = Breaks(method, error), Breaks("", error)
    watch.add_follower(broken)
    watch.add_follower(healthy)
    run(watch)
    assert len(watch.alerts) == 3
    assert broken.calls[-1] == method
    assert broken.calls.count(method) == 1
    assert healthy.calls == ["follow"] * 3 + ["at_rest", "close"]
    assert said(caplog, "Breaks", error, word)
    assert len(watch.faults) == 1


def test_a_follower_that_fails_at_a_crash_does_not_hide_the_crash(caplog):
    watch = open_watch([], None, None)
    watch.add_follower(Breaks("crashed", ValueError("no")))
    watch.crashed(KeyError("batch"))
    assert watch.faults == ["Breaks: ValueError: no"]


def test_a_rule_without_a_state_to_save_costs_no_checkpoint():
    spike = torchprobe.LossSpike(window=2)
    watch = open_watch([Breaks("state_dict", ValueError("no")), spike], None, None)
    watch(Record(1, 0.0, {"loss": 1.0}))
    assert watch.state_dict()["rules"] == {"loss_spike": {"loss": {"largest": 1.0, "values": [1.0]}}}
    assert watch.faults == ["rule breaks: ValueError: no"]
    watch = open_watch([Breaks("state_dict", KeyboardInterrupt())], None, None)
    with pytest.raises(KeyboardInterrupt):  # in the training thread it is the user's
        watch.state_dict()


def test_a_long_reason_is_one_short_line():
    watch = open_watch([Breaks("call", ValueError("a\nb " * 1000))], None, None)
    run(watch)
    [fault] = watch.faults
    assert fault.startswith("rule breaks: ValueError: a b a b")
    assert len(fault) < 400


@pytest.mark.parametrize(
    "options",
    [
        {"rules": [at_each], "on_alert": Breaks("call", SystemExit(1))},
        {"rules": [Breaks("call", KeyboardInterrupt())]},
        {"rules": [Breaks("at_rest", SystemExit(1))]},
    ],
    ids=["on_alert", "rule", "rule at rest"],
)
def test_the_run_is_recorded_to_its_end(options):
    model, writer = nn.Linear(4, 2), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with torchprobe.instrument(model, writer=writer, every=1, flush_every=3, **options) as session:
        for _ in range(9):
            model(torch.randn(3, 4)).square().mean().backward()
            optimizer.step()
        assert session.flush()
    assert [step for step, _ in writer.scalars("overview/grad_norm")] == list(range(1, 10))
