import threading

import numpy as np
import pytest

from torchprobe.records import Histogram, Record, Text
from torchprobe.writers.protocol import MemoryWriter, Writer

HISTOGRAM = Histogram(np.arange(2.0), np.array([4]))


@pytest.fixture
def writer():
    writer = MemoryWriter()
    first = {"train/loss": 0.5, "gradients/w": HISTOGRAM, "alerts": Text("none")}
    writer.write([Record(1, 0.0, first), Record(2, 1.0, {"train/loss": 0.25})])
    return writer


def test_it_is_a_writer(writer):
    assert isinstance(writer, Writer)


def test_records_are_kept_in_order(writer):
    assert [record.step for record in writer.records] == [1, 2]


def test_changing_the_returned_list_changes_nothing(writer):
    writer.records.clear()
    assert len(writer.records) == 2


def test_tags_are_sorted(writer):
    assert writer.tags() == ["alerts", "gradients/w", "train/loss"]


def test_a_series_has_steps_and_values_of_its_kind_only(writer):
    assert writer.scalars("train/loss") == [(1, 0.5), (2, 0.25)]
    assert writer.histograms("gradients/w") == [(1, HISTOGRAM)]
    assert writer.scalars("gradients/w") == writer.histograms("train/loss") == writer.scalars("nothing") == []


def test_a_value_is_the_latest_or_that_of_a_step(writer):
    assert writer.value("train/loss") == 0.25
    assert writer.value("train/loss", step=1) == 0.5
    assert writer.value("alerts") == Text("none")


def test_the_last_of_two_values_at_one_step_wins(writer):
    writer.write([Record(2, 2.0, {"train/loss": 7.0})])
    assert writer.value("train/loss", step=2) == 7.0


def test_a_wrong_tag_is_answered_with_near_ones(writer):
    with pytest.raises(KeyError, match=r"no value was written under tag 'train/los'; near ones: train/loss"):
        writer.value("train/los")


def test_a_tag_that_resembles_none_is_answered_with_all(writer):
    with pytest.raises(KeyError, match="tags written: alerts, gradients/w, train/loss"):
        writer.value("0000000")


def test_an_empty_writer_says_so():
    with pytest.raises(KeyError, match="tags written: none"):
        MemoryWriter().value("loss")


def test_a_wrong_step_is_answered_with_the_steps_there_are(writer):
    with pytest.raises(KeyError, match=r"'train/loss' has no value at step 9; its steps: \[1, 2\]"):
        writer.value("train/loss", step=9)


def test_close_is_remembered_and_keeps_the_records(writer):
    assert not writer.closed
    writer.close()
    assert writer.closed
    assert writer.scalars("train/loss")


def test_records_written_by_many_threads_are_all_there():
    writer = MemoryWriter()
    batches = [[Record(step, 0.0, {"x": float(step)})] for step in range(200)]

    def write(share):
        for batch in share:
            writer.write(batch)
            writer.value("x")

    threads = [threading.Thread(target=write, args=(batches[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(step for step, _ in writer.scalars("x")) == list(range(200))
