"""Explicit calls: the tags, values and steps of `instrument`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import torchprobe
from tests.logger.runs import backward, evaluate, small_model, train
from torchprobe.statistics import calibration
from torchprobe.testing import MemoryWriter


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


def test_autocast_and_inference_mode_change_no_statistic():
    writer = MemoryWriter()
    epistemic = torch.rand(1000)
    with torchprobe.TrainingLogger(writer=writer) as logger, torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            logger.log_uncertainty_metrics(epistemic[:500])
        logger.log_uncertainty_metrics(epistemic[500:])
    assert writer.value("uncertainty_epistemic/root") == pytest.approx(epistemic.double().mean().item())
