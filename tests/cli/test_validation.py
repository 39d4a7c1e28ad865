from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from torchprobe.cli.bayesian_transformer import BayesianTransformer, Validation, epistemic_uncertainty, validate


class Answers(nn.Module):
    """Reads its logits off the words, so that every answer is known."""

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return 4.0 * nn.functional.one_hot(words[:, 0], 3).float()


def run(model: nn.Module, words: list[int], labels: list[int]) -> Validation:
    data = TensorDataset(torch.tensor(words)[:, None], torch.tensor(labels))
    return validate(model, data, passes=2, batch_size=2, device=torch.device("cpu"))


def test_accuracy_and_loss_are_means_over_passages_not_over_batches():
    validation = run(Answers(), words=[0, 1, 2], labels=[0, 1, 0])
    assert validation.accuracy == pytest.approx(2 / 3)
    normaliser = math.log(math.exp(4) + 2)
    assert validation.loss == pytest.approx((2 * (normaliser - 4) + normaliser) / 3)


def test_classes_are_judged_one_by_one():
    validation = run(Answers(), words=[0, 1, 2, 1], labels=[0, 1, 0, 2])
    assert validation.class_accuracy == pytest.approx((0.5, 1.0, 0.0))


def test_a_model_without_chance_has_no_epistemic_uncertainty():
    validation = run(Answers(), words=[0, 1, 1], labels=[0, 1, 2])
    assert validation.epistemic_right == pytest.approx(0, abs=1e-6)
    assert validation.epistemic_wrong == pytest.approx(0, abs=1e-6)


def test_a_mean_over_no_passage_is_nan():
    assert math.isnan(run(Answers(), words=[0], labels=[0]).epistemic_wrong)


def test_validation_leaves_the_model_in_training_mode_and_without_gradients():
    model = BayesianTransformer(3, vocabulary=20, length=4, width=8, heads=2)
    validation = run(model, words=[1, 2, 3], labels=[0, 1, 2])
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert validation.epistemic > 0
    assert validation.metrics() == {
        "accuracy": validation.accuracy,
        "loss": validation.loss,
        "epistemic": validation.epistemic,
    }


def test_members_that_are_sure_of_different_things_are_maximally_epistemic():
    certain = torch.eye(2)[:, None, :]
    assert epistemic_uncertainty(certain).item() == pytest.approx(math.log(2))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(2, 5), st.integers(0, 2**16), st.floats(0.01, 20))
def test_epistemic_agrees_with_the_float64_definition(passes: int, batch: int, classes: int, seed: int, scale: float):
    logits = scale * torch.randn(passes, batch, classes, generator=torch.Generator().manual_seed(seed))
    p = logits.double().softmax(-1).numpy()
    mean = p.mean(0)
    entropy = -np.sum(mean * np.log(mean), -1)
    expected = entropy + np.mean(np.sum(p * np.log(p), -1), 0)
    got = epistemic_uncertainty(logits.softmax(-1))
    assert (got >= 0).all()
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-6)
