"""What is in a run directory, as each of TensorBoard's two loaders shows it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import STORE_EVERYTHING_SIZE_GUIDANCE, EventAccumulator

from tests import warm

# In a process of its own: the client leaves its pipes and temporary directory to the garbage collector.
_SHOW = """
import json, sys, time
from tensorboard import context
from tensorboard.data import server_ingester
from tensorboard.util import grpc_util

ingester = server_ingester.SubprocessServerDataIngester(
    server_ingester.get_server_binary(), sys.argv[1], reload_interval=3600,
    channel_creds_type=grpc_util.ChannelCredsType.LOCAL,
)
ingester.start()
provider, request, run = ingester.data_provider, context.RequestContext(), sys.argv[2]
asked = dict(ctx=request, experiment_id="")
scalars, shown = {}, {}
while not provider.list_scalars(plugin_name="scalars", **asked):
    time.sleep(0.05)
points = provider.read_scalars(plugin_name="scalars", downsample=1000, **asked)[run]
for tag, series in provider.list_scalars(plugin_name="scalars", **asked)[run].items():
    scalars[tag] = series.description, [(p.step, p.value) for p in points[tag]]
for plugin in ("histograms", "text", "torchprobe"):
    for tag, series in provider.list_tensors(plugin_name=plugin, **asked).get(run, {}).items():
        points = provider.read_tensors(plugin_name=plugin, downsample=1000, **asked)[run][tag]
        shown[tag] = series.description, [(p.step, p.numpy.tolist()) for p in points]
for plugin in ("hparams", "custom_scalars"):
    for tag, series in provider.list_tensors(plugin_name=plugin, **asked).get(run, {}).items():
        points = provider.read_tensors(plugin_name=plugin, downsample=1, **asked)[run][tag]
        shown[tag] = len(series.plugin_content), [(p.step, len(p.numpy.tobytes())) for p in points]
for tag, series in provider.list_blob_sequences(plugin_name="images", **asked).get(run, {}).items():
    points = provider.read_blob_sequences(plugin_name="images", downsample=1000, **asked)[run][tag]
    blobs = [[provider.read_blob(request, blob_key=v.blob_key) for v in p.values] for p in points]
    shown[tag] = series.description, [(p.step, b[:2]) for p, b in zip(points, blobs)]
print(json.dumps([scalars, shown], default=bytes.decode))
"""


def python_points(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The points of scalars by tag, with `EventAccumulator`."""
    shown = EventAccumulator(str(run), STORE_EVERYTHING_SIZE_GUIDANCE).Reload()
    return {tag: [(e.step, e.value) for e in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


def rust_points(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The same with the data server that `tensorboard --load_fast=true` starts."""
    return {tag: [(step, value) for step, value in points] for tag, (_, points) in _rust(run)[0].items()}


def rust_series(run: Path) -> dict[str, list[Any]]:
    """All series by tag, with the data server: (description, [(step, value)]).

    Of hyperparameters and layouts: (bytes of metadata, [(step, bytes)]). Of an image: its width and height.
    """
    scalars, others = _rust(run)
    return scalars | others


def _rust(run: Path) -> list[dict[str, list[Any]]]:
    command = [*warm.python(), "-W", "ignore", "-c", _SHOW, str(run.parent), run.name]
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    found: list[dict[str, list[Any]]] = json.loads(done.stdout)
    return found


def has_rust_loader() -> bool:
    """Whether there is a data server for this platform."""
    try:
        import tensorboard_data_server
    except ImportError:
        return False
    return tensorboard_data_server.server_binary() is not None
