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
    "bayesian_transformer.py": "uncertainty_epistemic/root",
}


def test_every_example_is_listed():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(TAGS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TAGS if name != "bayesian_transformer.py"])  # has its own test
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


@pytest.mark.slow
def test_the_bayesian_transformer_keeps_its_best_and_prints_how_well_it_separates(tmp_path):
    command = [sys.executable, str(EXAMPLES / "bayesian_transformer.py"), "--steps", "20", "--log-dir", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    assert last.startswith("AUROC of epistemic uncertainty, email against held-out passages: ")
    assert 0 < float(last.rsplit(" ", 1)[1]) < 1
    import torch

    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert all(name.startswith("network.") for name in best)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert len(events.Scalars(TAGS["bayesian_transformer.py"])) == 20
    assert {"val/accuracy", "val/calibration/ece", "val/uncertainty_epistemic/root", "val/ood/auroc"} <= set(scalars)
    assert f"{events.Scalars('val/ood/auroc')[0].value:.3f}" == last.rsplit(" ", 1)[1]
