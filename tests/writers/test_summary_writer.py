import logging

import numpy as np
import pytest
from tensorboard.util.tensor_util import make_ndarray
from torch.utils.tensorboard import SummaryWriter

from torchprobe.records import Histogram, Image, Record, Text
from torchprobe.writers.protocol import Writer
from torchprobe.writers.summary_writer import SummaryWriterAdapter

HISTOGRAM = Histogram(np.array([0.0, 1.0, 3.0, 5.0]), np.array([0, 2, 1]))
EVERYTHING = Record(
    step=3,
    wall_time=12.5,
    values={
        "loss/train": 0.5,
        "hist": HISTOGRAM,
        "note": Text("calm"),
        "map": Image(np.zeros((2, 5, 3), np.uint8)),
        "heads": np.ones((1, 2), np.float32),
    },
    descriptions={"loss": "what *it* is"},
)


class CallRecorder:
    """Something with the methods of a SummaryWriter, tensorboardX's for one, and no file writer."""

    def __init__(self, *missing):
        self.calls, self.missing = [], missing

    def __getattr__(self, name):
        if not name.startswith(("add_", "flush")) or name in self.missing:
            raise AttributeError(name)
        return lambda *arguments: self.calls.append((name, *arguments))


class ForeignEvents(CallRecorder):
    """A SummaryWriter whose file writer takes only its own Event class."""

    class file_writer:  # noqa: N801
        event_writer = None

        @staticmethod
        def add_event(event, step, walltime):
            pytest.fail("an Event of another package ends tensorboardX's thread")


@pytest.fixture
def theirs(tmp_path):
    """The user's own writer, which has written something before."""
    writer = SummaryWriter(tmp_path)
    writer.add_scalar("mine", 1.0, 1)
    yield writer
    writer.close()


@pytest.fixture
def adapter(theirs):
    return SummaryWriterAdapter(theirs)


def test_it_is_a_writer(adapter):
    assert isinstance(adapter, Writer)


def test_every_value_joins_the_users_own_in_the_one_file(adapter, accumulate, event_files, tmp_path):
    adapter.write([EVERYTHING])
    shown = accumulate(tmp_path)
    assert len(event_files(tmp_path)) == 1
    assert sorted(shown.Tags()["scalars"]) == ["loss/train", "mine"]
    (loss,) = shown.Scalars("loss/train")
    assert (loss.step, loss.wall_time, loss.value) == (3, 12.5, 0.5)
    (histogram,) = shown.Tensors("hist")
    assert make_ndarray(histogram.tensor_proto).tolist() == [[1.0, 3.0, 2.0], [3.0, 5.0, 1.0]]
    assert shown.SummaryMetadata("loss/train").summary_description == "what *it* is"


def test_a_record_is_one_event_and_metadata_comes_once(adapter, load_events, event_files, tmp_path):
    adapter.write([EVERYTHING])
    adapter.write([EVERYTHING])
    events = [e for e in load_events(event_files(tmp_path)[0]) if e.step == 3]
    described = [{v.tag for v in e.summary.value if v.HasField("metadata")} for e in events]
    assert described == [set(EVERYTHING.values), set()]


def test_close_flushes_and_leaves_the_users_writer_open(adapter, theirs, accumulate, tmp_path):
    adapter.write([EVERYTHING])
    adapter.close()
    theirs.add_scalar("mine", 2.0, 2)
    theirs.flush()
    assert [event.value for event in accumulate(tmp_path).Scalars("mine")] == [1.0, 2.0]


def test_a_writer_that_its_user_has_closed_is_not_opened_again(adapter, theirs, event_files, tmp_path):
    theirs.close()
    with pytest.raises(ValueError, match=r"given as writer= is closed: close it after session\.detach\(\)"):
        adapter.write([EVERYTHING])
    adapter.close()
    assert len(event_files(tmp_path)) == 1


def test_a_closed_writer_is_refused_at_once(theirs):
    theirs.close()
    with pytest.raises(ValueError, match="writer= is closed"):
        SummaryWriterAdapter(theirs)


def test_a_file_that_the_user_began_anew_gets_the_metadata_again(adapter, theirs, accumulate, tmp_path):
    adapter.write([EVERYTHING])
    theirs.close()
    for old in tmp_path.glob("*tfevents*"):
        old.unlink()
    theirs.add_scalar("mine", 2.0, 2)
    adapter.write([EVERYTHING])
    assert accumulate(tmp_path).SummaryMetadata("hist").plugin_data.plugin_name == "histograms"


def test_a_writer_of_two_sessions_at_once_is_said(caplog):
    writer = CallRecorder()
    first = SummaryWriterAdapter(writer)
    assert not caplog.records
    SummaryWriterAdapter(writer)
    assert "overview/loss, mix with this one's" in caplog.text
    first.close()
    caplog.clear()
    SummaryWriterAdapter(writer).close()
    assert not caplog.records


def test_what_is_no_writer_is_refused_by_name():
    with pytest.raises(TypeError, match=r"writer='runs' has no add_scalar: pass a torch\.utils"):
        SummaryWriterAdapter("runs")


@pytest.mark.parametrize("kind", [CallRecorder, ForeignEvents])
def test_other_writers_get_a_call_per_value(kind):
    theirs = kind()
    SummaryWriterAdapter(theirs).write([EVERYTHING])
    calls = {call[0]: call[1:] for call in theirs.calls}
    assert calls["add_scalar"] == ("loss/train", 0.5, 3, 12.5)
    assert calls["add_text"] == ("note", "calm", 3, 12.5)
    low, high, number, total, squares = 1.0, 5.0, 3, 2 * 2.0 + 4.0, 2 * 2.0**2 + 4.0**2
    raw = (low, high, number, total, squares, [3.0, 5.0], [2, 1])
    assert calls["add_histogram_raw"] == ("hist", *raw, 3, 12.5)
    assert calls["add_image"][1].shape == (3, 2, 5)
    assert calls["add_tensor"][1].tolist() == [[1.0, 1.0]]
    assert [call[0] for call in theirs.calls].count("flush") == 1


def test_what_a_writer_has_no_method_for_is_reported_once(caplog):
    theirs = CallRecorder("add_tensor", "add_text")
    with caplog.at_level(logging.WARNING, "torchprobe"):
        SummaryWriterAdapter(theirs).write([EVERYTHING, EVERYTHING])
    assert sorted(record.getMessage() for record in caplog.records) == [
        "writer= has no add_tensor: heads and its like are not written",
        "writer= has no add_text: note and its like are not written",
    ]
    assert {call[0] for call in theirs.calls} == {"add_scalar", "add_histogram_raw", "add_image", "flush"}


def test_an_empty_histogram_is_taken_too():
    theirs = CallRecorder()
    empty = Histogram(np.array([0.0, 1.0]), np.array([0]))
    SummaryWriterAdapter(theirs).write([Record(1, 0.0, {"hist": empty})])
    assert theirs.calls[0] == ("add_histogram_raw", "hist", 0.0, 0.0, 0, 0.0, 0.0, [], [], 1, 0.0)


def test_an_empty_batch_calls_nothing():
    theirs = CallRecorder()
    SummaryWriterAdapter(theirs).write([])
    assert theirs.calls == []


def test_tensorboardx_writes_the_values_too(tmp_path, accumulate):
    tensorboardx = pytest.importorskip("tensorboardX")
    with tensorboardx.SummaryWriter(str(tmp_path)) as theirs:
        SummaryWriterAdapter(theirs).write([EVERYTHING])
    shown = accumulate(tmp_path)
    assert [(event.step, event.value) for event in shown.Scalars("loss/train")] == [(3, 0.5)]
    assert shown.Histograms("hist")[0].histogram_value.bucket == [2.0, 1.0]
    assert shown.Images("map")[0].width == 5
