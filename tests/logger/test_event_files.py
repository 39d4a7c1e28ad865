"""Explicit calls, in real event files: until when they are written, and in which folder."""

from __future__ import annotations

import os
import subprocess
import textwrap

import numpy as np
import pytest
import torch
from tensorboard.plugins.hparams import plugin_data_pb2

import torchprobe
from tests import warm
from tests.logger.runs import evaluate, read, steps_of, train


def test_a_training_run_is_in_its_event_file(tmp_path):
    logger = torchprobe.TrainingLogger(tmp_path, "exp1", log_gradients_every=2, log_histograms_every=4)
    assert logger.global_step == 0
    train(logger, 5)
    assert logger.global_step == 5
    logger.log_metrics({"score": evaluate(logger)}, prefix="val")
    assert logger.close()
    events = read(tmp_path / "exp1")
    assert steps_of(events, "train/loss") == [1, 2, 3, 4, 5]
    assert steps_of(events, "lr/AdamW/group_0") == [1, 2, 3, 4, 5]
    assert steps_of(events, "grad_norm/0.weight") == steps_of(events, "overview/grad_norm") == [1, 2, 4]
    assert [event.step for event in events.Tensors("parameters/2.bias")] == [1, 4]
    assert [event.step for event in events.Tensors("gradients/2.bias")] == [1, 4]
    assert steps_of(events, "val/score") == [5]
    assert steps_of(events, "val/calibration/ece") == steps_of(events, "val/uncertainty_total/root") == [5]


def test_the_page_of_hyperparameters_has_the_run(tmp_path):
    with torchprobe.TrainingLogger(tmp_path, "exp1") as logger:
        logger.log_metrics({"loss": 2.0})
        logger.increment_step()
        logger.log_hparams({"lr": 1e-3, "dropout": True, "name": "small", "depth": np.int64(3)}, {"accuracy": 0.75})
    events = read(tmp_path / "exp1")
    content = events.PluginTagToContent("hparams")
    start = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info
    assert start.hparams["dropout"].bool_value is True
    assert start.hparams["lr"].number_value == 1e-3
    assert start.hparams["name"].string_value == "small"
    assert start.hparams["depth"].number_value == 3
    end = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/session_end_info"]).session_end_info
    assert end.status == 1
    assert set(content) == {"_hparams_/session_start_info", "_hparams_/session_end_info"}
    assert events.Scalars("accuracy")[0].value == 0.75
    assert events.Scalars("accuracy")[0].step == 1
    assert b"dropout" in events.Tensors("hparams")[0].tensor_proto.string_val[0]


def test_a_run_that_fails_says_so(tmp_path):
    def fail() -> None:
        with torchprobe.TrainingLogger(tmp_path) as logger:
            logger.log_hparams({"lr": 1.0})
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    content = read(tmp_path).PluginTagToContent("hparams")
    end = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/session_end_info"]).session_end_info
    assert end.status == 2


def test_flush_puts_the_running_step_on_disk(tmp_path):
    with torchprobe.TrainingLogger(tmp_path) as logger:
        logger.log_text("note", "**hello**")
        logger.log_metrics({"loss": torch.tensor(2.5)})
        assert logger.flush(timeout=30)
        events = read(tmp_path)
        assert events.Scalars("loss")[0].value == 2.5
        assert events.Tensors("note")[0].tensor_proto.string_val[0] == b"**hello**"
        logger.log_metrics({"late": 1.0})
    assert steps_of(read(tmp_path), "late") == [1]


@pytest.mark.parametrize("name", ["..", "../up", "a/b", "a\\b", "a..b", "", ".", " "])
def test_an_experiment_name_that_is_no_folder_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"experiment_name=.*takes one folder name"):
        torchprobe.TrainingLogger(tmp_path, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_writes_nothing(tmp_path):
    script = f"""
        import os, torchprobe
        with torchprobe.TrainingLogger({str(tmp_path)!r}) as logger:
            logger.log_metrics({{"parent": 1.0}})
            child = os.fork()
            if child == 0:
                logger.log_metrics({{"child": 1.0}})
                logger.increment_step()
                os._exit(7 if logger.close() else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    """
    subprocess.run([*warm.python(), "-c", textwrap.dedent(script)], check=True, timeout=120)
    assert read(tmp_path).Tags()["scalars"] == ["parent"]


FORGETS_TO_CLOSE = """
import sys, torchprobe
logger = torchprobe.TrainingLogger(sys.argv[1])
logger.log_metrics({"loss": 1.0})
"""


def test_a_logger_that_is_never_closed_writes_at_exit(tmp_path):
    subprocess.run([*warm.python(), "-c", FORGETS_TO_CLOSE, str(tmp_path)], check=True, timeout=120)
    assert read(tmp_path).Scalars("loss")[0].value == 1.0
