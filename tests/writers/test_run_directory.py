"""Where a run begins when others begin too, and what a place that fails costs."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests import warm
from tests.loaders import python_points
from torchprobe.records import Record
from torchprobe.writers.event_file import EventFileWriter
from torchprobe.writers.run_directory import LOCK, RunDirectory, open_writer


def record(step=1):
    return Record(step, 1.7e9 + step, {"loss": step / 2})


@pytest.fixture
def directories():
    """Makes run directories and closes them after the test."""
    made = []

    def make(log_dir, **options):
        made.append(RunDirectory(log_dir, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def earlier_run(directory):
    writer = EventFileWriter(directory)
    writer.write([record()])
    writer.close()


def test_a_name_in_the_log_directory_that_is_taken_gets_a_second_run_in_it(tmp_path):
    earlier_run(tmp_path / "exp")
    run, writer = open_writer(None, tmp_path, "exp", "experiment")
    assert run.path == tmp_path / "exp"
    writer.write([record()])
    writer.close()
    assert run.path == tmp_path / "exp" / "run_2"


def test_nothing_comes_after_the_end(directories, tmp_path):
    run = directories(tmp_path)
    run.close()
    with pytest.raises(OSError, match="closed"):
        run.folder("flight").put("1.json", b"{}")
    assert list(tmp_path.iterdir()) == []


# Several at once


def test_of_many_that_begin_at_once_each_has_a_directory_of_its_own(directories, tmp_path):
    runs = [directories(tmp_path) for _ in range(8)]
    barrier = threading.Barrier(len(runs))

    def begin(run):
        barrier.wait()
        run.write([record()])

    threads = [threading.Thread(target=begin, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    places = {run.path for run in runs}
    assert len(places) == len(runs)
    assert tmp_path in places
    assert all(len(list(place.glob("*tfevents*"))) == 1 for place in places)
    assert not (tmp_path / LOCK).exists()


PROCESS = """
import sys
from pathlib import Path
from torchprobe.records import Record
from torchprobe.writers.run_directory import RunDirectory

run = RunDirectory(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
run.write([Record(1, 1.7e9, {"loss": 1.0})])
print(run.path)
"""


def test_of_several_processes_each_has_a_directory_of_its_own(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [*warm.python(), "-c", PROCESS, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    places = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert len(places) == 3
    assert str(tmp_path) in places


@pytest.mark.parametrize(("age", "place"), [(0.0, "run_2"), (3600.0, ".")])
def test_a_lock_that_a_killed_process_left_stops_nobody(directories, tmp_path, age, place):
    (tmp_path / LOCK).touch()
    os.utime(tmp_path / LOCK, (time.time() - age,) * 2)
    run = directories(tmp_path)
    run.write([record()])
    assert run.path == tmp_path / place
    assert (tmp_path / LOCK).exists() == (place != ".")


# What cannot be written


def test_a_failed_first_write_takes_one_place_alone(directories, tmp_path, full_disk):
    earlier_run(tmp_path)
    run = directories(tmp_path)
    for _ in range(3):
        with full_disk(0), pytest.raises(OSError, match="File too large"):
            run.write([record()])
    run.write([record()])
    assert run.path == tmp_path / "run_2"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["run_2"]


def test_a_directory_that_was_deleted_before_the_first_write_is_made_again(directories, tmp_path):
    run = directories(tmp_path / "run")
    (tmp_path / "run").rmdir()
    run.write([record()])
    assert run.path == tmp_path / "run"


def test_a_state_that_comes_after_a_write_moves_what_follows(directories, tmp_path):
    first = directories(tmp_path)
    first.write([record(1), record(2)])
    second = directories(tmp_path)
    second.write([record(1)])
    second.load_state_dict(first.state_dict())
    second.restart(3)
    second.write([record(3)])
    assert second.path == tmp_path
    assert [step for step, _ in python_points(tmp_path)["loss"]] == [1, 2, 3]
