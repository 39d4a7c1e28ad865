"""TensorBoard's Rust loader, the default of `tensorboard`, reads the same as its Python one."""

import numpy as np
import pytest

from tests.loaders import has_rust_loader, rust_series
from torchprobe.records import Histogram, HParams, Image, Layout, Lines, Record, Text
from torchprobe.writers.event_file import EventFileWriter
from torchprobe.writers.hparams import START_TAG, plugin_data
from torchprobe.writers.layout import LAYOUT_TAG

pytestmark = pytest.mark.skipif(not has_rust_loader(), reason="no data server for this platform")

data_server = pytest.importorskip("tensorboard_data_server")


@pytest.fixture
def shown(tmp_path):
    """What the data server shows of a run that was killed at step 3 and resumed at step 2."""
    for steps in ((1, 2, 3), (2, 4)):
        writer = EventFileWriter(tmp_path / "run")
        writer.write([record(step) for step in steps])
        writer.close()
    return rust_series(tmp_path / "run")


def record(step):
    values = {
        "loss/train": step / 2,
        "heads": np.full((1, 2), step, np.float32),
        "hist/w": Histogram(np.arange(3.0), np.array([0, step])),
        "hist/empty": Histogram(np.arange(3.0), np.array([0, 0])),
        "note": Text("calm"),
        "map": Image(np.zeros((2, 5, 3), np.uint8)),
        START_TAG: HParams({"tied": True}, 1.7e9),
        LAYOUT_TAG: Layout({"Overview": (Lines("Loss", ("loss/.*" * step,)),)}),
    }
    return Record(step, 1.7e9 + step, values, {name.split("/")[0]: f"about {name}" for name in values})


def test_values_steps_and_descriptions_reach_the_page(shown):
    assert shown == {
        "loss/train": ["about loss/train", [[1, 0.5], [2, 1.0], [4, 2.0]]],
        "heads": ["about heads", [[1, [[1.0, 1.0]]], [2, [[2.0, 2.0]]], [4, [[4.0, 4.0]]]]],
        "hist/w": ["about hist/empty", [[s, [[1.0, 2.0, float(s)]]] for s in (1, 2, 4)]],
        "hist/empty": ["about hist/empty", [[1, []], [2, []], [4, []]]],
        "note": ["about note", [[1, "calm"], [2, "calm"], [4, "calm"]]],
        "map": ["about map", [[s, ["5", "2"]] for s in (1, 2, 4)]],
        START_TAG: [len(plugin_data(HParams({"tied": True}, 1.7e9))), [[4, 0]]],
        LAYOUT_TAG: [0, [[4, 8]]],  # of several layouts the last; its array holds one reference
    }
