"""What attaching to many modules costs, in calls, and what it imports."""

from __future__ import annotations

import cProfile
import pstats
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import torchprobe

MOST_CALLS = {"instrument": 88, "detach": 20}
"""Of Python and of C, for each module more, of which every second one owns parameters."""


def calls(modules: int, folder: Path) -> dict[str, int]:
    """Of attaching to a model of linear layers and ReLUs in turn, with all defaults, and of detaching."""
    model = nn.Sequential(*(nn.ReLU() if i % 2 else nn.Linear(4, 4) for i in range(modules)))
    with cProfile.Profile() as attaching:
        session = torchprobe.instrument(model, log_dir=folder)
    with cProfile.Profile() as detaching:
        session.detach()
    of_each = {"instrument": attaching, "detach": detaching}
    return {name: pstats.Stats(profile).total_calls for name, profile in of_each.items()}


@pytest.fixture(scope="module")
def calls_a_module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attach")
    calls(2, folder / "imports")
    few, many = (calls(modules, folder / str(modules)) for modules in (100, 200))
    return {name: (many[name] - few[name]) / 100 for name in few}


@pytest.mark.parametrize("what", MOST_CALLS)
def test_a_module_more_costs_few_calls(calls_a_module, what):
    assert calls_a_module[what] <= MOST_CALLS[what]


def test_writing_events_does_not_bring_the_stub_of_tensorflow():
    """It takes half a second where boto3 is installed."""
    check = "import sys, torchprobe.writers.event_file; print('tensorboard.compat.tensorflow_stub' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == "False"


def test_hparams_go_to_the_page_of_that_name():
    from tensorboard.plugins.hparams.metadata import PLUGIN_NAME

    from torchprobe.records import HParams, Outcome
    from torchprobe.writers.event_file import _PLUGINS

    assert {_PLUGINS[kind][0] for kind in (HParams, Outcome)} == {PLUGIN_NAME}
