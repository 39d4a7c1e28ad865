"""Wrong calls are refused; what fails inside stops no training, reads no device and fills no memory."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import torchprobe
from tests.logger.runs import backward, small_model
from tests.modes import NoHostRead
from torchprobe.buffer.outlet import Outlet
from torchprobe.testing import MemoryWriter


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
    broken = nn.Linear(1, 1)
    broken.__dict__["_parameters"] = None
    writer = MemoryWriter()
    with torchprobe.TrainingLogger(writer=writer, log_gradients_every=1) as logger:
        for _ in range(3):
            logger.log_gradients(broken)
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
