from __future__ import annotations

from pathlib import Path

import pytest

from torchprobe.records import Record, Text
from torchprobe.writers.event_file import EventFileWriter


def write_run(path: Path, values: dict[str, list], wall_time: float = 1000.0) -> Path:
    """A run with one value a step for each tag; None leaves a step out."""
    writer = EventFileWriter(path)
    for i in range(max(map(len, values.values()))):
        there = {tag: column[i] for tag, column in values.items() if i < len(column) and column[i] is not None}
        writer.write([Record(step=i + 1, wall_time=wall_time + i, values=there)])
    writer.close()
    return path


@pytest.fixture
def ill_run(tmp_path: Path) -> Path:
    """A run that goes wrong: NaN at the end, with an alert."""
    alert = "- exploding\\_gradient, step 3 at fc1: total norm &lt; 10 x the largest (value 90, threshold 10)"
    return write_run(
        tmp_path / "ill",
        {
            "overview/loss": [2.0, 1.0, 5.0, float("nan")],
            "overview/skipped_steps": [0.0, 0.0, 0.0, 2.0],
            "overview/probe_overhead": [0.01, 0.02, 0.02, 0.9],
            "train/accuracy": [0.1, 0.5, 0.4, 0.1],
            "grad_norm_layer/fc1": [1.0, 2.0, 90.0, 1.0],
            "grad_norm_layer/fc2": [0.5, 0.5, 0.5, 0.5],
            "attention_entropy/block.attn": [3.0, 2.0, 1.0, 0.5],
            "val/calibration/ece": [None, 0.2, None, 0.1],
            "alerts/exploding_gradient": [None, None, 1.0],
            "alerts": [None, None, Text(alert)],
        },
    )
