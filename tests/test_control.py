"""A run is sampled otherwise while it goes on: by a call, or by a file in its directory."""

from __future__ import annotations

import logging
import os
import threading
import time

import pytest
import torch

import torchprobe
from tests.models import inputs, mlp
from torchprobe.probes.schedule import window
from torchprobe.testing import MemoryWriter

GRADIENT, HISTOGRAM, RATE = "grad_norm/0.weight", "gradients/0.weight", "lr/SGD/group_0"


def loop(model):
    """A function that trains so many steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(inputs("mlp")).square().mean().backward()
            optimizer.step()

    return train


def steps_of(writer: MemoryWriter, tag: str) -> list[int]:
    return [record.step for record in writer.records if tag in record.values]


# ---- calls


def test_another_cadence_holds_from_the_next_step_on():
    model, writer = mlp(), MemoryWriter()
    train = loop(model)
    with torchprobe.instrument(model, writer=writer, every=100) as session:
        train(13)
        session.every(5)
        train(9)
        session.every(window(25, 26))
        train(8)
    assert steps_of(writer, GRADIENT) == steps_of(writer, HISTOGRAM) == [1, 15, 20, 25, 26]
    assert steps_of(writer, RATE) == list(range(1, 31))


def test_a_probe_that_names_a_cadence_keeps_it():
    model, writer = mlp(), MemoryWriter()
    train = loop(model)
    probes = [torchprobe.Gradients(every=4), torchprobe.Parameters()]
    with torchprobe.instrument(model, writer=writer, probes=probes, every=100) as session:
        train(2)
        session.every(3)
        train(8)
    assert steps_of(writer, GRADIENT) == [1, 4, 8]
    assert steps_of(writer, "param_norm/0.weight") == [1, 3, 6, 9]


def test_the_next_steps_are_sampled_whatever_the_cadence_and_the_budget():
    model, writer = mlp(), MemoryWriter()
    train = loop(model)
    probes = [torchprobe.Gradients(every=100), torchprobe.Histograms(every=1000), torchprobe.LearningRates(every=50)]
    with torchprobe.instrument(model, writer=writer, probes=probes, overhead_budget=1e-9) as session:
        train(3)
        session.sample_next(4)
        train(9)
        session.sample_next(1)
        session.sample_next(2)
        train(4)
    assert steps_of(writer, GRADIENT) == steps_of(writer, HISTOGRAM) == [1, 4, 5, 6, 7, 13, 14]
    assert steps_of(writer, RATE) == [1]


def test_what_no_schedule_samples_stays_so():
    model, writer = mlp(), MemoryWriter()
    train = loop(model)
    with torchprobe.instrument(model, writer=writer) as session:  # with a look for NaN, for when there is some
        session.sample_next(3)
        train(3)
        due = {reporter.name for reporter in session._plan.due}
    assert "Provenance" in due  # a default probe
    model, writer = mlp(), MemoryWriter()
    train = loop(model)
    with torchprobe.instrument(model, writer=writer, probes=[torchprobe.Gradients()]) as session:
        session.sample_next(3)
        train(3)
        assert {reporter.name for reporter in session._plan.due} == {"Gradients"}


def test_validation_after_such_a_step_is_sampled():
    model, writer = mlp(), MemoryWriter()
    train = loop(model)
    with torchprobe.instrument(model, writer=writer, every=100) as session:
        train(3)
        session.sample_next(1)
        for _ in range(3):
            train(1)
            with torch.no_grad():
                model.eval()(inputs("mlp"))
            model.train()
    assert steps_of(writer, "val/activation_mean/0") == [4]


@pytest.mark.parametrize("wrong", [0, -1, True, 2.0, "3", None])
def test_what_is_no_number_of_steps_is_refused_by_name(wrong):
    model = mlp()
    with torchprobe.instrument(model, writer=MemoryWriter()) as session:
        with pytest.raises((TypeError, ValueError), match="steps="):
            session.sample_next(wrong)
        with pytest.raises((TypeError, ValueError), match="every="):
            session.every(wrong)


def test_calls_of_other_threads_are_not_lost():
    """However they fall between the training thread's decisions."""
    model, writer = mlp(), MemoryWriter()
    train = loop(model)
    with torchprobe.instrument(model, writer=writer, every=10**6, rules=[]) as session:
        train(2)
        for _ in range(20):
            before = session.step
            thread = threading.Thread(target=session.sample_next, args=(1,))
            thread.start()
            train(2)
            thread.join()
            train(2)
            session.flush()
            assert [step for step in steps_of(writer, GRADIENT) if step > before]


def test_a_compiled_model_follows():
    model, writer = mlp(), MemoryWriter()
    train = loop(torch.compile(model, backend="aot_eager"))
    with torchprobe.instrument(model, writer=writer, every=100) as session:
        train(4)
        session.sample_next(2)
        train(5)
    seen = steps_of(writer, "activation_mean/0")
    assert seen == steps_of(writer, GRADIENT)
    assert len(seen) == 3
    assert seen[1] in (5, 6)  # what a graph records in the step after the call may be settled already


# ---- the file


class Run:
    """A run in a directory whose records are also kept."""

    def __init__(self, directory, **options) -> None:
        self.model, self.seen = mlp(), []
        self.train = loop(self.model)
        rules = [lambda record: self.seen.append(record.step) if GRADIENT in record.values else None]
        self.session = torchprobe.instrument(
            self.model, log_dir=directory, every=10**6, rules=rules, flush_seconds=1e6, **options
        )

    def write(self, content: str, name: str = "control.json") -> None:
        (self.session.log_dir / name).write_text(content)
        assert self.session.flush()  # the drain thread wakes up


def test_the_file_is_read_when_it_is_written_and_when_it_is_touched(tmp_path):
    run = Run(tmp_path)
    with run.session:
        run.train(2)
        run.write('{"sample_next": 2}')
        run.train(4)
        run.write("", name="another.json")
        run.train(1)
        os.utime(run.session.log_dir / "control.json", (time.time() + 5, time.time() + 5))
        assert run.session.flush()
        run.train(3)
        run.write('{"every": 4, "sample_next": 1}')
        run.train(6)
    assert run.seen == [1, 3, 4, 8, 9, 11, 12, 16]


def test_a_file_from_before_the_run_says_nothing(tmp_path):
    (tmp_path / "control.json").write_text('{"every": 1}')
    run = Run(tmp_path)
    with run.session:
        run.train(2)
        assert run.session.flush()
        run.train(3)
    assert run.seen == [1]


def test_a_run_beside_another_one_has_a_file_of_its_own(tmp_path):
    with Run(tmp_path).session as session:
        session.next_step()
    run = Run(tmp_path)
    with run.session:
        run.train(2)
        assert run.session.flush()
        assert run.session.log_dir != tmp_path
        (tmp_path / "control.json").write_text('{"every": 1}')
        assert run.session.flush()
        run.train(2)
        run.write('{"sample_next": 1}')
        run.train(2)
    assert run.seen == [1, 5]


BAD = [
    "", "{", "[]", "{}", "10", '{"every": 0}', '{"every": "10"}', '{"every": true}', '{"sample_next": 1.5}',
    '{"every": 10, "sample_next": null}', '{"sample_nxt": 3}', "\x00", "[" * 3000, "{" + " " * 5000 + "}",
]  # fmt: skip


@pytest.mark.parametrize("content", BAD, ids=range(len(BAD)))
def test_what_it_cannot_mean_changes_nothing_and_is_said_once(content, tmp_path, caplog):
    run = Run(tmp_path)
    with caplog.at_level(logging.WARNING, "torchprobe"), run.session:
        run.train(2)
        run.write(content)
        run.train(2)
        os.utime(run.session.log_dir / "control.json", (time.time() + 5, time.time() + 5))
        assert run.session.flush()
        run.train(2)
        run.write('{"sample_next": 1}')
        run.train(2)
    assert caplog.text.count("control.json: ") == 1
    assert '{"every": 10}' in caplog.text
    assert run.seen == [1, 7]


def test_one_that_is_half_written_is_looked_at_again(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("torchprobe.control._SLACK", 10**12)  # however long this machine takes
    run = Run(tmp_path)
    with caplog.at_level(logging.WARNING, "torchprobe"), run.session:
        run.train(2)
        run.write('{"sample_next"')
        run.write('{"sample_next": 1}')
        run.train(2)
    assert run.seen == [1, 3]
    assert not caplog.text


def test_what_is_no_file_is_not_opened(tmp_path, caplog):
    run = Run(tmp_path)
    with run.session:
        run.train(2)
        os.mkfifo(run.session.log_dir / "control.json")
        assert run.session.flush(timeout=20)
        run.train(2)
    assert "control.json: is no file" in caplog.text
    assert run.seen == [1]


def test_nobody_looks_for_it_in_the_training_thread(tmp_path, monkeypatch):
    from torchprobe import control

    threads, read = set(), control._read
    monkeypatch.setattr(control, "_read", lambda file: threads.add(threading.current_thread().name) or read(file))
    run = Run(tmp_path)
    with run.session:
        run.train(2)
        run.write('{"sample_next": 1}')
    assert threads == {"torchprobe-drain"}
