"""Every example runs as a user would run it, and leaves what it promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
TAGS = {  # what each example is there to show
    "quickstart.py": "overview/grad_norm",
    "custom_probe.py": "saturated/3",
}


def test_every_example_is_listed():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(TAGS)


@pytest.mark.slow
@pytest.mark.parametrize("name", TAGS)
def test_example(name, tmp_path):
    command = [sys.executable, str(EXAMPLES / name), "--steps", "40", "--log-dir", str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    series = events.Scalars(TAGS[name])
    assert len(series) >= 3
    assert len({event.value for event in series}) > 1
