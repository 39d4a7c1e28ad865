import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

from torchprobe.writers.tfrecord import frame


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=5))
def test_tensorboard_reads_back_every_record(payloads):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "events.out.tfevents.1"
        path.write_bytes(b"".join(map(frame, payloads)))
        assert list(RawEventFileLoader(str(path)).Load()) == payloads


def test_a_frame_is_sixteen_bytes_longer_than_its_data():
    assert len(frame(b"12345")) == 5 + 16
