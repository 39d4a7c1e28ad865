"""Runs whose directory is a URL: in memory, and in an S3 store that goes down and comes back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

import torchprobe
from tests import warm
from tests.models import inputs, mlp
from torchprobe.buffer import backlog
from torchprobe.records import Record
from torchprobe.reports.run import NoRunError, read_run
from torchprobe.writers import files, remote
from torchprobe.writers.event_file import EventFileWriter

fsspec = pytest.importorskip("fsspec", reason="needs fsspec")


@pytest.fixture
def memory():
    """fsspec's store in memory, empty."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield store
    store.store.clear()


def names(store, url="memory://runs/a"):
    return sorted(store.ls(url, detail=False))


def events_in(store, path, tmp_path):
    local = tmp_path / path.rpartition("/")[2]
    local.write_bytes(store.cat_file(path))
    return list(LegacyEventFileLoader(str(local)).Load())


def scalars(store, tmp_path, tag, url="memory://runs/a"):
    paths = [path for path in names(store, url) if "tfevents" in path]
    events = [event for path in paths for event in events_in(store, path, tmp_path)]
    return [(e.step, v.simple_value) for e in events for v in e.summary.value if v.tag == tag]


def records(*steps):
    return [Record(step, 1.7e9 + step, {"loss": step / 2}) for step in steps]


def train(model, steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(inputs("mlp")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_run_in_a_store_is_one_growing_object(memory, tmp_path):
    writer = EventFileWriter("memory://runs/a")
    writer.write(records(1, 2))
    writer.write(records(3))
    writer.close()
    assert len(names(memory)) == 1
    assert scalars(memory, tmp_path, "loss") == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert writer.path == f"memory://{names(memory)[0].lstrip('/')}"


def test_an_object_that_is_large_is_followed_by_another_one(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FULL", 200)
    writer = EventFileWriter("memory://runs/a")
    for step in range(1, 6):
        writer.write(records(step))
    assert len(names(memory)) > 1
    assert scalars(memory, tmp_path, "loss") == [(step, step / 2) for step in range(1, 6)]
    starts = [e.step for path in names(memory) for e in events_in(memory, path, tmp_path) if e.HasField("session_log")]
    assert starts == sorted(set(starts))


def test_a_session_writes_there_and_says_where(memory, tmp_path):
    model = mlp()
    with torchprobe.instrument(model, log_dir="memory://runs", run_name="a", every=1) as session:
        assert session.log_dir == "memory://runs/a"
        train(model, 3)
        assert session.flush()
        assert [step for step, _ in scalars(memory, tmp_path, "overview/grad_norm")] == [1, 2, 3]
    assert "memory://runs/a" in session.summary()


def test_an_alert_leaves_its_flight_recording_there(memory):
    model = mlp()
    with torchprobe.instrument(model, log_dir="memory://runs/a", every=1, rules=[on_step_5]):
        train(model, 6)
    assert names(memory, "memory://runs/a/flight") == ["/runs/a/flight/5.json"]
    content = json.loads(memory.cat_file("/runs/a/flight/5.json"))
    assert [record["step"] for record in content["records"]] == [1, 2, 3, 4, 5]


def test_an_exception_in_the_loop_is_recorded_there(memory):
    def loop():
        with torchprobe.instrument(model := mlp(), log_dir="memory://runs/a", every=1, rules=[]):
            train(model, 2)
            raise KeyError("batch")

    with pytest.raises(KeyError):
        loop()
    content = json.loads(memory.cat_file("/runs/a/flight/2.json"))
    assert (content["reason"], "KeyError" in content["exception"]) == ("exception", True)


def test_a_remote_run_is_read_back_with_its_recordings(memory):
    for name in ("a", "b"):
        with torchprobe.instrument(model := mlp(), log_dir="memory://runs", run_name=name, every=1, rules=[on_step_5]):
            train(model, 6)
    run = read_run("memory://runs/b")
    assert run.path == "memory://runs/b"
    assert run.scalars["overview/grad_norm"].steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert [flight["file"] for flight in run.flights] == ["memory://runs/b/flight/5.json"]
    assert read_run("memory://runs").path == "memory://runs/b"
    with pytest.raises(NoRunError, match="no run is recorded in 'memory://runs/c'"):
        read_run("memory://runs/c")


def test_a_path_object_names_the_same_place(memory):
    EventFileWriter(Path("memory://runs/a")).write(records(1))
    assert len(names(memory)) == 1


def test_a_run_after_another_sorts_behind_it(memory, tmp_path):
    first = EventFileWriter("memory://runs/a")
    first.write(records(1, 2, 3))
    second = EventFileWriter("memory://runs/a")
    second.restart(3)
    second.write(records(3))
    old, new = names(memory)
    assert old.rpartition("/")[2] == first.path.rpartition("/")[2]
    assert [e.step for e in events_in(memory, new, tmp_path) if e.HasField("session_log")] == [3]


def test_a_second_run_in_a_store_goes_beside_the_first_and_a_state_goes_on(memory, tmp_path, caplog):
    states = []
    for value in (1.0, 2.0, 3.0):
        with torchprobe.instrument(model := mlp(), log_dir="memory://runs/a", every=1, rules=[]) as session:
            if value == 3.0:
                session.load_state_dict(states[1])
            train(model, 2)
            states.append(session.state_dict())
    assert session.log_dir == "memory://runs/a/run_2"
    assert [step for step, _ in scalars(memory, tmp_path, "overview/grad_norm")] == [1, 2]
    below = scalars(memory, tmp_path, "overview/grad_norm", "memory://runs/a/run_2")
    assert [step for step, _ in below] == [1, 2, 3, 4]
    assert len([message for message in caplog.messages if "memory://runs/a/run_2" in message]) == 1


def test_a_file_url_is_a_local_directory(tmp_path):
    model = mlp()
    with torchprobe.instrument(model, log_dir=f"file://{tmp_path}/run") as session:
        train(model, 1)
    assert session.log_dir == tmp_path / "run"
    assert list((tmp_path / "run").glob("*tfevents*"))


def test_a_batch_that_was_not_taken_is_written_again_whole(memory, tmp_path, monkeypatch):
    writer = EventFileWriter("memory://runs/a")
    writer.write(records(1))

    def fail(*_):
        raise ConnectionResetError("the network is down")

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "pipe_file", fail)
        with pytest.raises(OSError, match="the network is down"):
            writer.write(records(2))
    writer.write(records(2))
    assert scalars(memory, tmp_path, "loss") == [(1, 0.5), (2, 1.0)]


class StoreError(Exception):
    """What a store's client library raises."""


def test_a_stores_own_exceptions_are_tried_again_as_well(memory, monkeypatch):
    writer = EventFileWriter("memory://runs/a")

    def fail(*_):
        raise StoreError

    monkeypatch.setattr(type(memory), "pipe_file", fail)
    with pytest.raises(OSError, match="StoreError"):
        writer.write(records(1))


def test_an_unknown_kind_of_url_is_refused():
    with pytest.raises(ValueError, match=r"log_dir='nowhere://x': fsspec knows no 'nowhere'"):
        torchprobe.instrument(mlp(), log_dir="nowhere://x")


@pytest.mark.parametrize("module", ["fsspec", "s3fs"])
def test_a_missing_package_is_named_with_what_to_install(module, monkeypatch):
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)  # imported before
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"log_dir='s3://bucket/runs/run' needs a package.*torchprobe\[remote\]"):
        torchprobe.instrument(mlp(), log_dir="s3://bucket/runs/run")


# An S3 store (fixture `s3`)


def eventually(flush, seconds=60.0):
    """A flush tries once; a connection that the store has closed meanwhile costs the first attempt."""
    deadline = time.monotonic() + seconds
    while not flush(seconds):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.slow
def test_a_store_that_goes_down_and_comes_back_has_everything(s3, monkeypatch, caplog):
    for part in (backlog, files):
        monkeypatch.setattr(part, "_FIRST_RETRY", 0.1)
        monkeypatch.setattr(part, "_LAST_RETRY", 0.2)
    model = mlp()
    with torchprobe.instrument(
        model, log_dir="s3://bucket/runs/run", every=1, probes=[torchprobe.Gradients()], rules=[on_step_5]
    ) as session:
        train(model, 3)
        assert eventually(session.flush)
        s3.down()
        train(model, 3)
        assert not session.flush(60)
        assert "tried again" in caplog.text
        s3.up()
        train(model, 2)
        assert eventually(session.flush)
    steps = subprocess.run([*warm.python(), "-W", "ignore", "-c", READ], capture_output=True, text=True, timeout=240)
    assert steps.stdout.split() == [str(step) for step in range(1, 9)], steps.stderr
    [flight] = read_run("s3://bucket/runs/run").flights
    assert (flight["step"], flight["file"]) == (5, "s3://bucket/runs/run/flight/5.json")


def on_step_5(record):
    there = record.step == 5
    return [torchprobe.Alert("on_step_5", record.step, None, 5.0, None, "while the store is down")] if there else []


READ = """
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
shown = EventMultiplexer().AddRunsFromDirectory("s3://bucket/runs").Reload()
print(*[event.step for event in shown.Tensors("run", "overview/grad_norm")])
"""


@pytest.mark.slow
def test_a_store_that_is_down_at_the_start_is_an_error(s3):
    s3.down()
    with pytest.raises(OSError, match=r"log_dir='s3://bucket/runs/run': cannot write there"):
        torchprobe.instrument(mlp(), log_dir="s3://bucket/runs/run")


@pytest.mark.slow
def test_a_script_that_never_detaches_is_written_at_its_end(s3):
    script = """
import torch, torchprobe
model = torch.nn.Linear(4, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
torchprobe.instrument(model, log_dir="s3://bucket/runs/run", every=1)
for _ in range(3):
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
"""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "AWS_ENDPOINT_URL": s3.url.replace("127.0.0.1", "localhost"),
    }
    result = subprocess.run(
        [*warm.python(), "-c", script], env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    steps = subprocess.run([*warm.python(), "-W", "ignore", "-c", READ], capture_output=True, text=True, timeout=240)
    assert steps.stdout.split() == ["1", "2", "3"], result.stderr + steps.stderr
