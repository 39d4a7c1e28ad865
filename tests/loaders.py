"""The points of a run directory's scalars, as each of TensorBoard's two loaders shows them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import STORE_EVERYTHING_SIZE_GUIDANCE, EventAccumulator

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
provider, request = ingester.data_provider, context.RequestContext()
while not provider.list_scalars(request, experiment_id="", plugin_name="scalars"):
    time.sleep(0.05)
runs = provider.read_scalars(request, experiment_id="", plugin_name="scalars", downsample=1000)
print(json.dumps({tag: [(p.step, p.value) for p in points] for tag, points in runs[sys.argv[2]].items()}))
"""


def python_points(run: Path) -> dict[str, list[tuple[int, float]]]:
    """By tag, with `EventAccumulator`."""
    shown = EventAccumulator(str(run), STORE_EVERYTHING_SIZE_GUIDANCE).Reload()
    return {tag: [(e.step, e.value) for e in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


def rust_points(run: Path) -> dict[str, list[tuple[int, float]]]:
    """By tag, with the data server that `tensorboard --load_fast=true` starts."""
    command = [sys.executable, "-W", "ignore", "-c", _SHOW, str(run.parent), run.name]
    output = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
    return {tag: [(step, value) for step, value in points] for tag, points in json.loads(output).items()}


def has_rust_loader() -> bool:
    """Whether there is a data server for this platform."""
    try:
        import tensorboard_data_server
    except ImportError:
        return False
    return tensorboard_data_server.server_binary() is not None
