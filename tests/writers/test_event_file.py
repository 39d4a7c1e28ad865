import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tensorboard.compat.proto.event_pb2 import SessionLog
from tensorboard.util.tensor_util import make_ndarray

from torchprobe.records import Histogram, Image, Record, Text
from torchprobe.writers.event_file import EventFileWriter
from torchprobe.writers.protocol import Writer


@pytest.fixture
def open_writer(tmp_path):
    """Makes writers in the run directory and closes them after the test."""
    writers = []

    def make(**options):
        writers.append(EventFileWriter(tmp_path / "run", **options))
        return writers[-1]

    yield make
    for writer in writers:
        writer.close()


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def scalars(accumulate, run):
    """The (step, value) pairs that TensorBoard shows for a tag."""
    return lambda tag: [(event.step, event.value) for event in accumulate(run).Scalars(tag)]


def start_steps(events):
    return [event.step for event in events if event.session_log.status == SessionLog.START]


def test_it_is_a_writer(open_writer):
    assert isinstance(open_writer(), Writer)


# What TensorBoard reads


def test_scalars_come_back_with_step_and_time(open_writer, scalar_record, accumulate, run):
    open_writer().write([scalar_record(1, loss=0.5), scalar_record(2, loss=0.25)])
    events = accumulate(run).Scalars("loss")
    assert [(e.step, e.wall_time, e.value) for e in events] == [(1, 1.7e9 + 1, 0.5), (2, 1.7e9 + 2, 0.25)]


def test_non_finite_scalars_are_written_as_they_are(open_writer, scalar_record, scalars):
    open_writer().write([scalar_record(1, nan=math.nan, up=math.inf, down=-math.inf)])
    assert math.isnan(scalars("nan")[0][1])
    assert scalars("up") == [(1, math.inf)]
    assert scalars("down") == [(1, -math.inf)]


def test_two_records_of_one_step_are_both_there(open_writer, scalar_record, scalars):
    open_writer().write([scalar_record(4, a=1.0), scalar_record(4, b=2.0)])
    assert (scalars("a"), scalars("b")) == ([(4, 1.0)], [(4, 2.0)])


def test_every_kind_of_value_reaches_its_page(open_writer, accumulate, run):
    values = {
        "loss": 0.5,
        "gradients/w": Histogram(np.arange(4.0), np.array([0, 2, 0])),
        "alerts": Text("**calm**"),
        "map": Image(np.zeros((2, 3, 3), np.uint8)),
        "heads": np.eye(2, dtype=np.float32),
    }
    open_writer().write([Record(5, 1.7e9, values, {"gradients": "log10 of magnitude"})])
    shown = accumulate(run)
    tensors = {tag: make_ndarray(shown.Tensors(tag)[0].tensor_proto) for tag in shown.Tags()["tensors"]}
    assert tensors["gradients/w"].tolist() == [[1.0, 2.0, 2.0]]
    assert tensors["alerts"].item() == b"**calm**"
    assert tensors["map"][:2].tolist() == [b"3", b"2"]
    assert tensors["heads"].tolist() == [[1.0, 0.0], [0.0, 1.0]]
    plugins = {tag: shown.SummaryMetadata(tag).plugin_data.plugin_name for tag in values}
    assert plugins == {
        "loss": "scalars",
        "gradients/w": "histograms",
        "alerts": "text",
        "map": "images",
        "heads": "torchprobe",
    }
    assert shown.SummaryMetadata("gradients/w").summary_description == "log10 of magnitude"


def test_a_record_is_one_event_and_metadata_comes_once_a_file(open_writer, scalar_record, load_events):
    writer = open_writer()
    writer.write([scalar_record(1, a=1.0, b=1.0), scalar_record(2, a=1.0, c=1.0)])
    writer.write([scalar_record(3, a=1.0, b=1.0, c=1.0)])
    records = [event for event in load_events(writer.path) if event.HasField("summary")]
    described = [[v.tag for v in event.summary.value if v.HasField("metadata")] for event in records]
    assert described == [["a", "b"], ["c"], []]


def test_the_file_begins_with_version_and_session_start(open_writer, scalar_record, load_events):
    writer = open_writer()
    writer.write([scalar_record(1)])
    first, second, _ = load_events(writer.path)
    assert first.file_version == "brain.Event:2"
    assert second.session_log.status == SessionLog.START


def test_an_empty_batch_writes_nothing(open_writer):
    writer = open_writer()
    size = writer.path.stat().st_size
    writer.write([])
    assert writer.path.stat().st_size == size


# Runs that follow one another


def test_a_run_after_another_hides_the_steps_that_it_repeats(open_writer, scalar_record, scalars):
    open_writer().write([scalar_record(step, loss=1.0) for step in (1, 2, 3, 4)])
    open_writer().write([scalar_record(3, loss=9.0)])
    assert scalars("loss") == [(1, 1.0), (2, 1.0), (3, 9.0)]


def test_restart_step_says_from_where_the_old_steps_are_hidden(open_writer, scalar_record, scalars):
    open_writer().write([scalar_record(step, loss=1.0) for step in (1, 2, 3, 4)])
    open_writer(restart_step=2).write([scalar_record(10, loss=9.0)])
    assert scalars("loss") == [(1, 1.0), (10, 9.0)]


def test_an_old_file_is_never_touched(open_writer, scalar_record):
    old = open_writer()
    old.write([scalar_record(1)])
    before = old.path.read_bytes()
    new = open_writer()
    new.write([scalar_record(2)])
    assert new.path != old.path
    assert old.path.read_bytes() == before


def test_the_name_says_time_host_and_process(open_writer):
    before = int(time.time())
    path = open_writer(filename_suffix=".probe").path
    assert path.name.startswith("events.out.tfevents.")
    assert before <= int(path.name.split(".")[3]) <= time.time()
    assert path.name.endswith(f".{os.getpid()}.0.probe")


def test_a_new_file_sorts_last_even_if_the_clock_goes_back(open_writer, event_files, run):
    run.mkdir()
    ahead = run / "events.out.tfevents.4000000000.host.1.0"
    ahead.touch()
    paths = [ahead, open_writer().path, open_writer().path]
    assert event_files(run) == paths


def test_other_files_in_the_directory_do_not_matter(open_writer, run):
    run.mkdir()
    (run / "events.out.tfevents.not-a-number.host").touch()
    (run / "model.pt").touch()
    assert open_writer().path.exists()


# Files that vanish, disks that fill


def test_a_deleted_file_is_followed_by_a_complete_one(open_writer, scalar_record, scalars, load_events):
    writer = open_writer()
    writer.write([scalar_record(1)])
    writer.path.unlink()
    writer.write([scalar_record(2, loss=7.0)])
    assert scalars("loss") == [(2, 7.0)]
    version, start, record = load_events(writer.path)
    assert (version.file_version, start.session_log.status) == ("brain.Event:2", SessionLog.START)
    assert record.summary.value[0].HasField("metadata")


def test_a_deleted_directory_is_made_again(open_writer, scalar_record, scalars, run):
    writer = open_writer()
    writer.path.unlink()
    run.rmdir()
    writer.write([scalar_record(2, loss=7.0)])
    assert scalars("loss") == [(2, 7.0)]


def test_a_file_moved_within_the_run_stays_visible(open_writer, scalar_record, scalars):
    writer = open_writer()
    writer.write([scalar_record(1, loss=1.0), scalar_record(2, loss=2.0)])
    writer.path.rename(writer.path.with_name(writer.path.name + ".rotated"))
    writer.write([scalar_record(2, other=5.0), scalar_record(3, loss=3.0)])
    assert scalars("loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_batch_that_does_not_fit_can_be_written_later(open_writer, scalar_record, scalars, full_disk):
    writer = open_writer()
    writer.write([scalar_record(1, loss=1.0)])
    before = writer.path.read_bytes()
    batch = [scalar_record(2, loss=2.0), Record(2, 0.0, {"note": Text("x" * 200_000)})]
    with full_disk(100_000), pytest.raises(OSError, match="File too large"):
        writer.write(batch)
    assert writer.path.read_bytes() == before
    writer.write(batch)
    assert scalars("loss") == [(1, 1.0), (2, 2.0)]


def test_a_retried_batch_has_the_same_bytes_for_a_loader_that_follows(open_writer, monkeypatch, load_events):
    writer = open_writer()
    batch = [Record(1, 5.0, {"loss": 1.0}, {"loss": "why"})]
    pieces = []

    def no_space(data):
        pieces.append(data)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer._file, "append", no_space)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            writer.write(batch)
    monkeypatch.undo()
    writer.write(batch)
    assert pieces[0] == pieces[1]
    assert writer.path.read_bytes().endswith(pieces[0])
    assert start_steps(load_events(writer.path)) == [1]


def test_a_torn_tail_costs_the_last_record_only(open_writer, scalar_record, load_events, tmp_path):
    writer = open_writer()
    writer.write([scalar_record(1)])
    whole = writer.path.read_bytes()
    writer.write([scalar_record(2)])
    longer = writer.path.read_bytes()
    for size in range(len(whole), len(longer)):
        torn = tmp_path / f"events.out.tfevents.{size}"
        torn.write_bytes(longer[:size])
        assert [event.step for event in load_events(torn)][2:] == [1]


KILLED = """
import sys
from torchprobe.records import Record
from torchprobe.writers.event_file import EventFileWriter
writer = EventFileWriter(sys.argv[1])
for step in range(1, 1_000_000):
    writer.write([Record(step, 0.0, {f"tag/{i}": float(step) for i in range(50)})])
    print(step, flush=True)
"""


def test_nothing_written_is_lost_when_the_process_is_killed(run, accumulate):
    command = [sys.executable, "-c", KILLED, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        steps = [int(process.stdout.readline()) for _ in range(30)]
        process.send_signal(signal.SIGKILL)
        steps += [int(line) for line in process.stdout if line.endswith("\n")]
    shown = accumulate(run)
    for tag in ("tag/0", "tag/49"):
        assert [event.step for event in shown.Scalars(tag)][: len(steps)] == steps


def test_closing_twice_is_harmless(open_writer):
    writer = open_writer()
    writer.close()
    writer.close()
    assert writer.path.exists()
