"""Wrong arguments of what stands beside `instrument`: an error at the call that names the argument, never later."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import torchprobe
from torchprobe.testing import MemoryWriter


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"filename_suffix": "a/b"}, ValueError, "filename_suffix='a/b': takes a short part"),
        ({"filename_suffix": "\0"}, ValueError, "filename_suffix=.*takes a short part"),
        ({"filename_suffix": "\ud800"}, ValueError, "filename_suffix=.*takes a short part"),
        ({"filename_suffix": "x" * 300}, ValueError, "filename_suffix='xxx"),
        ({"filename_suffix": 3}, TypeError, "filename_suffix=3: takes a string, not int"),
        ({"restart_step": "x"}, TypeError, "restart_step='x': takes a step or None, not str"),
        ({"restart_step": 1.5}, TypeError, "restart_step=1.5: takes a step or None, not float"),
    ],
)
def test_of_an_event_file(tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        torchprobe.EventFileWriter(tmp_path, **options)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("url", ["s3://bucket/run", "gs://bucket", "memory://x"])
def test_checkpoints_go_to_no_store(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"directory='{url}': takes a local path"):
        torchprobe.CheckpointManager(url)
    assert not [*tmp_path.iterdir()]


def test_checkpoints_go_where_a_url_of_a_file_says(tmp_path):
    assert torchprobe.CheckpointManager(f"file://{tmp_path}/there").directory == tmp_path / "there"
    with pytest.raises(ValueError, match=r"directory=.*takes a path without NUL and half surrogate pairs"):
        torchprobe.CheckpointManager("\ud800")


@pytest.mark.parametrize("clock", [3, "now", float, lambda step: 1.0])
def test_of_a_rule_that_takes_a_function(clock):
    with pytest.raises(TypeError, match=r"clock=.*takes a function without arguments"):
        torchprobe.Stalled(clock=clock)


@pytest.mark.parametrize("prefix", [3, b"val", torch.ones(2)])
def test_a_prefix_that_is_no_text_is_named_by_every_call_of_a_logger(prefix):
    rows, probs = torch.full((1, 1, 2, 2), 0.5), torch.full((2, 2), 0.5)
    with torchprobe.TrainingLogger(writer=MemoryWriter()) as logger:
        for call in (
            lambda: logger.log_metrics({"a": 1.0}, prefix),
            lambda: logger.log_attention_stats(rows, prefix=prefix),
            lambda: logger.log_uncertainty_metrics(torch.ones(2), prefix=prefix),
            lambda: logger.log_calibration(probs, torch.zeros(2), prefix),
        ):
            with pytest.raises(TypeError, match=r"(?s)prefix=.*takes a str"):
                call()
        with pytest.raises(TypeError, match=r"(?s)metrics=.*takes a mapping"):
            logger.log_hparams({"a": 1}, torch.ones(2))


def test_a_prefix_that_no_file_can_hold_costs_its_values_alone(tmp_path):
    logger = torchprobe.TrainingLogger(writer=torchprobe.JsonLinesWriter(tmp_path / "run.jsonl"))
    logger.log_metrics({"loss": 1.0})
    logger.log_attention_stats(torch.full((1, 1, 2, 2), 0.5), prefix="\ud800")
    logger.increment_step()
    assert logger.close()
    [record] = map(json.loads, (tmp_path / "run.jsonl").read_text().splitlines())
    assert record["values"].keys() == {"loss"}


def test_a_number_behind_a_mask_is_not_told():
    writer, model = MemoryWriter(), torch.nn.Linear(2, 2)
    values = {"none": np.ma.masked, "hidden": np.ma.array(3.0, mask=True), "there": np.ma.array(3.0, mask=False)}
    with torchprobe.instrument(model, writer=writer) as session:
        session.log_metrics(values)
        session.next_step()
    assert np.isnan([writer.value("none"), writer.value("hidden")]).all()
    assert writer.value("there") == 3.0
