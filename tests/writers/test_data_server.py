"""TensorBoard's Rust loader, the default of `tensorboard`, reads the same as its Python one."""

import json
import subprocess
import sys

import numpy as np
import pytest

from torchprobe.records import Histogram, HParams, Image, Layout, Lines, Record, Text
from torchprobe.writers.event_file import EventFileWriter
from torchprobe.writers.hparams import START_TAG, plugin_data
from torchprobe.writers.layout_writer import LAYOUT_TAG

data_server = pytest.importorskip("tensorboard_data_server")

# In a process of its own: the client leaves its pipes and temporary directory to the garbage collector.
SHOW = """
import json, sys, time
from tensorboard import context
from tensorboard.data import server_ingester
from tensorboard.util import grpc_util

ingester = server_ingester.SubprocessServerDataIngester(
    server_ingester.get_server_binary(), sys.argv[1], reload_interval=3600,
    channel_creds_type=grpc_util.ChannelCredsType.LOCAL,
)
ingester.start()
provider, request = ingester.data_provider, context.RequestContext()
options = dict(experiment_id="", downsample=1000)
shown = {}
while not provider.list_scalars(request, experiment_id="", plugin_name="scalars"):
    time.sleep(0.05)
for tag, series in provider.list_scalars(request, experiment_id="", plugin_name="scalars")["run"].items():
    points = provider.read_scalars(request, plugin_name="scalars", **options)["run"][tag]
    shown[tag] = series.description, [(p.step, p.value) for p in points]
for plugin in ("histograms", "text", "torchprobe"):
    for tag, series in provider.list_tensors(request, experiment_id="", plugin_name=plugin)["run"].items():
        points = provider.read_tensors(request, plugin_name=plugin, **options)["run"][tag]
        shown[tag] = series.description, [(p.step, p.numpy.tolist()) for p in points]
for plugin in ("hparams", "custom_scalars"):
    for tag, series in provider.list_tensors(request, experiment_id="", plugin_name=plugin)["run"].items():
        points = provider.read_tensors(request, plugin_name=plugin, experiment_id="", downsample=1)["run"][tag]
        shown[tag] = len(series.plugin_content), [(p.step, len(p.numpy.tobytes())) for p in points]
images = provider.list_blob_sequences(request, experiment_id="", plugin_name="images")["run"]
for tag, series in images.items():
    points = provider.read_blob_sequences(request, plugin_name="images", **options)["run"][tag]
    blobs = [[provider.read_blob(request, blob_key=v.blob_key) for v in p.values] for p in points]
    shown[tag] = series.description, [(p.step, b[:2]) for p, b in zip(points, blobs)]
print(json.dumps(shown, default=bytes.decode))
"""


@pytest.fixture
def shown(tmp_path):
    """What the data server shows of a run that was killed at step 3 and resumed at step 2."""
    for steps in ((1, 2, 3), (2, 4)):
        writer = EventFileWriter(tmp_path / "run")
        writer.write([record(step) for step in steps])
        writer.close()
    command = [sys.executable, "-W", "ignore", "-c", SHOW, str(tmp_path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)


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


@pytest.mark.skipif(data_server.server_binary() is None, reason="no data server for this platform")
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
