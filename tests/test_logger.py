"""Explicit calls: the tags and steps of `instrument`, in real event files."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from torch import nn

import torchprobe
from tests.modes import NoHostRead
from torchprobe.buffer.outlet import Outlet
from torchprobe.statistics import calibration
from torchprobe.testing import MemoryWriter


def small_model() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def backward(model: nn.Module) -> torch.Tensor:
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(3, (16,)))
    loss.backward()
    return loss


def train(logger: torchprobe.TrainingLogger, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, optimizer = small_model()
    for _ in range(steps):
        loss = backward(model)
        logger.log_gradients(model)
        logger.log_learning_rate(optimizer)
        optimizer.step()
        logger.log_metrics({"loss": loss}, prefix="train")
        logger.log_model_histograms(model)
        logger.increment_step()
    return model, optimizer


def evaluate(logger: torchprobe.TrainingLogger | None = None) -> float:
    """As users write it: the logger is an optional argument."""
    for _ in range(3):
        probs, targets = torch.rand(20, 4).softmax(-1), torch.randint(4, (20,))
        if logger is not None:
            logger.log_calibration(probs, targets, prefix="val")
            logger.log_uncertainty_metrics(torch.rand(20), torch.rand(20), prefix="val")
    return 0.5


def read(directory) -> EventAccumulator:
    events = EventAccumulator(str(directory), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    return events


def steps_of(events: EventAccumulator, tag: str) -> list[int]:
    return [event.step for event in events.Scalars(tag)]


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


def test_tags_are_those_of_instrument():
    model, optimizer = small_model()
    found = MemoryWriter()
    with torchprobe.instrument(model, writer=found, every=1, probes=None):
        backward(model)
        optimizer.step()
    written = MemoryWriter()
    with torchprobe.TrainingLogger(writer=written) as logger:
        train(logger, 1)
        logger.log_calibration(torch.rand(4, 3).softmax(-1), torch.randint(3, (4,)))
    mine = {tag for tag in written.tags() if not tag.startswith(("train/", "gradients_nonfinite"))}
    assert mine - set(found.tags()) == set()


def test_values_are_those_of_the_tensors():
    writer = MemoryWriter()
    epistemic, aleatoric = torch.rand(10), np.random.default_rng(0).random(10)
    probs, targets = torch.rand(50, 4).softmax(-1), torch.randint(4, (50,))
    with torchprobe.TrainingLogger(writer=writer) as logger:
        logger.log_uncertainty_metrics(epistemic[:3], aleatoric[:3], name="head")
        logger.log_uncertainty_metrics(epistemic[3:], aleatoric[3:], name="head")
        logger.log_calibration(probs[:20], targets[:20])
        logger.log_calibration(probs[20:].numpy(), targets[20:].numpy())
    assert writer.value("uncertainty_epistemic/head") == pytest.approx(epistemic.mean().item())
    assert writer.value("uncertainty_total/head") == pytest.approx(epistemic.mean().item() + aleatoric.mean())
    assert writer.value("overview/epistemic") == pytest.approx(epistemic.mean().item())
    assert writer.value("uncertainty_epistemic_histogram/head").counts.sum() == 10
    whole = calibration.summarise(calibration.compute(probs, targets).numpy())
    for name in ("ece", "mce", "brier", "nll", "accuracy", "confidence", "confidence_gap"):
        assert writer.value(f"calibration/{name}") == pytest.approx(whole[name])


def test_calibration_is_drawn_in_validation_and_at_the_cadence_of_histograms():
    writer = MemoryWriter()
    with torchprobe.TrainingLogger(writer=writer, log_histograms_every=3) as logger:
        for _ in range(4):
            logger.log_calibration(torch.rand(20, 4).softmax(-1), torch.randint(4, (20,)))
            logger.increment_step()
            evaluate(logger)
    drawn = [r.step for r in writer.records if "calibration_reliability/predictions" in r.values]
    assert drawn == [1, 3]
    assert [r.step for r in writer.records if "val/calibration_reliability/predictions" in r.values] == [1, 2, 3, 4]
    assert len(writer.scalars("calibration/ece")) == 4


def test_epistemic_alone_has_no_total():
    writer = MemoryWriter()
    with torchprobe.TrainingLogger(writer=writer) as logger:
        logger.log_uncertainty_metrics(0.25)
    assert writer.value("uncertainty_epistemic/root") == 0.25
    assert not [tag for tag in writer.tags() if "total" in tag or "aleatoric" in tag]


def test_attention_by_layer_says_which_has_collapsed():
    writer = MemoryWriter()
    spread = torch.full((2, 3, 4, 5), 0.2)
    collapsed = spread.clone()
    collapsed[:, 1] = torch.eye(5)[:4]
    with torchprobe.TrainingLogger(writer=writer) as logger:
        logger.log_attention_stats([spread, collapsed, None], "encoder")
        logger.log_attention_stats({"self": spread.numpy()}, "decoder")
        logger.log_attention_stats(spread.mean(1), "pooled")
    assert writer.value("attention_entropy/encoder.0") == pytest.approx(math.log(5))
    assert writer.value("attention_entropy_normalized/decoder.self") == pytest.approx(1)
    assert writer.value("attention_max_prob/pooled") == pytest.approx(0.2)
    assert writer.value("attention_entropy_min/encoder.1") == pytest.approx(0, abs=1e-6)
    assert writer.value("attention_collapse/encoder.1") == 1
    assert writer.value("attention_collapse/encoder.0") == 0
    distance = torch.arange(4.0)[:, None].sub(torch.arange(5.0)).abs().mean().item()
    assert writer.value("attention_distance/encoder.0") == pytest.approx(distance)
    assert writer.value("attention_sink/encoder.0") == pytest.approx(0.2)
    assert not [tag for tag in writer.tags() if "max_logit" in tag]


def test_attention_of_several_batches_adds_up():
    writer, apart = MemoryWriter(), MemoryWriter()
    weights = torch.rand(6, 2, 4, 4).softmax(-1)
    with torchprobe.TrainingLogger(writer=writer) as logger, torchprobe.TrainingLogger(writer=apart) as other:
        logger.log_attention_stats(weights)
        other.log_attention_stats(weights[:1])
        other.log_attention_stats(weights[1:])
    for tag in ("attention_entropy/attention", "attention_distance/attention", "attention_max_prob/attention"):
        assert apart.value(tag) == pytest.approx(writer.value(tag))


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


def test_validation_belongs_to_the_step_that_has_just_ended():
    writer = MemoryWriter()
    with torchprobe.TrainingLogger(writer=writer) as logger:
        logger.log_metrics({"sanity": 0.0}, prefix="val")
        for _ in range(2):
            logger.log_metrics({"loss": 1.0}, prefix="train")
            logger.log_metrics({"within": 1.0}, prefix="val")
            logger.increment_step()
            logger.log_metrics({"loss": 1.0}, prefix="val")
    assert [step for step, _ in writer.scalars("val/sanity")] == [0]
    assert [step for step, _ in writer.scalars("val/within")] == [1, 2]
    assert [step for step, _ in writer.scalars("val/loss")] == [1, 2]
    assert [step for step, _ in writer.scalars("train/loss")] == [1, 2]


def test_a_step_of_which_nothing_was_logged_is_one_that_has_ended():
    writer = MemoryWriter()
    with torchprobe.TrainingLogger(writer=writer) as logger:
        logger.log_metrics({"loss": 1.0})
        logger.increment_step()
        logger.increment_step()
        logger.log_metrics({"loss": 1.0}, prefix="val")
        logger.log_metrics({"loss": 1.0})
        logger.flush()
        logger.log_metrics({"within": 1.0}, prefix="val")
    assert writer.scalars("val/loss") == [(2, 1.0)]
    assert writer.scalars("loss") == [(1, 1.0), (3, 1.0)]
    assert writer.scalars("val/within") == [(3, 1.0)]


def test_out_of_distribution_scores_belong_to_the_step_that_has_just_ended():
    writer = MemoryWriter()
    with torchprobe.TrainingLogger(writer=writer) as logger:
        logger.log_metrics({"loss": 1.0})
        logger.increment_step()
        logger.log_ood(torch.zeros(3), torch.ones(3))
    assert writer.scalars("ood/auroc") == [(1, 1.0)]


def test_gradients_of_two_models_stand_side_by_side_and_of_one_the_later_count():
    writer = MemoryWriter()
    first, second = nn.Sequential(nn.Linear(2, 1)), nn.ModuleDict({"d": nn.Linear(2, 1)})
    with torchprobe.TrainingLogger(writer=writer, log_gradients_every=1) as logger:
        for value in (1.0, 3.0):
            for parameter in (*first.parameters(), *second.parameters()):
                parameter.grad = torch.full_like(parameter, value)
            logger.log_gradients(first)
            logger.log_gradients(second)
    for name in ("0.bias", "d.bias"):
        assert writer.value(f"grad_norm/{name}") == 3.0
    assert writer.value("overview/grad_norm") == pytest.approx(math.sqrt(6 * 9))


def test_a_parameter_without_statistics_leaves_the_others_theirs():
    writer = MemoryWriter()
    model = nn.Sequential(nn.Linear(2, 1), nn.LazyLinear(3))
    model.register_parameter("table", nn.Parameter(torch.tensor([1, 2]), requires_grad=False))
    with torchprobe.TrainingLogger(writer=writer) as logger:
        logger.log_model_histograms(model)
    assert {tag for tag in writer.tags() if tag.startswith("parameters/")} == {
        "parameters/0.weight",
        "parameters/0.bias",
    }


@pytest.mark.parametrize("name", ["..", "../up", "a/b", "a\\b", "a..b", "", ".", " "])
def test_an_experiment_name_that_is_no_folder_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"experiment_name=.*takes one folder name"):
        torchprobe.TrainingLogger(tmp_path, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda log: log.log_metrics([1.0]), r"metrics=\[1.0\]: takes a mapping"),
        (lambda log: log.log_learning_rate(0.1), r"optimizer=0.1: takes a Optimizer, not float"),
        (lambda log: log.log_gradients(None), r"model=None: takes a Module, not NoneType"),
        (lambda log: log.log_model_histograms("m"), r"model='m': takes a Module"),
        (lambda log: log.log_uncertainty_metrics("much"), r"epistemic='much': takes a tensor, a numpy array"),
        (lambda log: log.log_calibration([0.5], torch.ones(1)), r"probs=\[0.5\]: takes a tensor or a numeric numpy"),
        (lambda log: log.log_attention_stats("w"), r"weights='w': takes a tensor, a numpy array"),
        (lambda log: log.log_text("tag", 3), r"text=3: takes a str, not int"),
        (lambda log: log.log_calibration(torch.ones(1), torch.ones(1), 3), r"prefix=3: takes a str, not int"),
        (lambda log: log.log_hparams({"a": [1]}), r"hparams\['a'\]=\[1\]: takes a bool"),
        (lambda log: log.log_hparams({}, {"a": "x"}), r"metrics\['a'\]='x': takes a number"),
        (lambda log: torchprobe.TrainingLogger(log_gradients_every="x"), r"log_gradients_every='x': takes a whole"),
    ],
)
def test_an_argument_of_a_wrong_kind_is_refused(call, message):
    with torchprobe.TrainingLogger(writer=MemoryWriter()) as logger, pytest.raises(TypeError, match=message):
        call(logger)


def test_shapes_that_do_not_go_together_are_refused():
    with torchprobe.TrainingLogger(writer=MemoryWriter()) as logger:
        with pytest.raises(ValueError, match=r"targets: got shape \(3,\) for probs of shape \(2, 2\)"):
            logger.log_calibration(torch.ones(2, 2), torch.ones(3))
        with pytest.raises(ValueError, match=r"weights of 'attention': got shape \(4, 4\)"):
            logger.log_attention_stats(torch.ones(4, 4))
        with pytest.raises(ValueError, match=r"aleatoric: got shape \(3,\), takes that of epistemic, \(2,\)"):
            logger.log_uncertainty_metrics(torch.ones(2), torch.ones(3))


def test_what_fails_inside_is_logged_once_and_training_goes_on(caplog):
    class Broken(nn.Module):
        def named_children(self):
            raise RuntimeError("broken model")

    writer = MemoryWriter()
    with torchprobe.TrainingLogger(writer=writer, log_gradients_every=1) as logger:
        for _ in range(3):
            logger.log_gradients(Broken())
            logger.log_metrics({"loss": 1.0})
            logger.increment_step()
    messages = [r for r in caplog.records if "log_gradients failed" in r.message]
    assert len(messages) == 1
    assert messages[0].exc_info
    assert writer.scalars("loss") == [(1, 1.0), (2, 1.0), (3, 1.0)]


def test_a_fault_of_the_steps_themselves_ends_logging_and_says_so(caplog, monkeypatch):
    def broken(*_):
        raise RuntimeError("no way out")

    writer = MemoryWriter()
    logger = torchprobe.TrainingLogger(writer=writer)
    monkeypatch.setattr(Outlet, "hand_over", broken)
    for _ in range(3):
        logger.log_metrics({"loss": 1.0})
        logger.increment_step()
    assert logger.global_step == 3
    assert not logger.close()
    assert [r.message for r in caplog.records] == ["torchprobe failed and stops recording; training goes on"]
    assert "no way out" in writer.records[-1].values["torchprobe/stopped"].markdown


def test_nothing_is_logged_after_close_and_closing_twice_is_fine(caplog):
    writer = MemoryWriter()
    logger = torchprobe.TrainingLogger(writer=writer)
    assert logger.close()
    with caplog.at_level(logging.WARNING):
        logger.log_metrics({"loss": 1.0})
        logger.log_metrics({"loss": 1.0})
        logger.increment_step()
    assert logger.close()
    assert not logger.flush()
    assert writer.records == []
    assert [r.message for r in caplog.records] == ["log_metrics after close() is ignored"]


def test_no_value_is_read_from_the_device():
    model, optimizer = small_model()
    loss = backward(model)
    with torchprobe.TrainingLogger(writer=MemoryWriter()) as logger, NoHostRead():
        logger.log_gradients(model)
        logger.log_model_histograms(model)
        logger.log_learning_rate(optimizer)
        logger.log_metrics({"loss": loss})
        logger.log_uncertainty_metrics(torch.rand(5), torch.rand(5))
        logger.log_calibration(torch.rand(5, 3).softmax(-1), torch.randint(3, (5,)))
        logger.log_attention_stats(torch.rand(2, 2, 4, 4).softmax(-1))
        logger.increment_step()


def test_autocast_and_inference_mode_change_no_statistic():
    writer = MemoryWriter()
    epistemic = torch.rand(1000)
    with torchprobe.TrainingLogger(writer=writer) as logger, torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            logger.log_uncertainty_metrics(epistemic[:500])
        logger.log_uncertainty_metrics(epistemic[500:])
    assert writer.value("uncertainty_epistemic/root") == pytest.approx(epistemic.double().mean().item())


def test_memory_stays_bounded_when_no_step_ends():
    with torchprobe.TrainingLogger(writer=MemoryWriter(), log_gradients_every=1) as logger:
        model, _ = small_model()
        backward(model)
        for _ in range(50):
            logger.log_gradients(model)
            logger.log_calibration(torch.rand(5, 3).softmax(-1), torch.randint(3, (5,)))
            logger.log_metrics({"loss": 1.0})
        gathered = logger._steps.current
        assert len(gathered.pieces) + len(gathered.values) == 3


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
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)
    assert read(tmp_path).Tags()["scalars"] == ["parent"]


def _forgets_to_close(directory) -> None:
    logger = torchprobe.TrainingLogger(directory)
    logger.log_metrics({"loss": 1.0})


def test_a_logger_that_is_never_closed_writes_at_exit(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=_forgets_to_close, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert read(tmp_path).Scalars("loss")[0].value == 1.0
