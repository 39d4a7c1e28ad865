from __future__ import annotations

import pytest
import torch
from torch import nn

from torchprobe.cli.bayesian_transformer import BayesianTransformer, monte_carlo_dropout


@pytest.fixture
def model() -> BayesianTransformer:
    torch.manual_seed(0)
    return BayesianTransformer(3, vocabulary=50, length=12, width=16, heads=2, depth=2)


@pytest.fixture
def words() -> torch.Tensor:
    return torch.tensor([[3, 7, 9, 4, 1], [8, 2, 0, 0, 0]])


def test_logits_have_a_row_a_passage_and_a_column_a_class(model: BayesianTransformer, words: torch.Tensor):
    assert model(words).shape == (2, 3)


def test_modules_have_readable_names(model: BayesianTransformer):
    names = dict(model.named_modules())
    assert {"word_embedding", "blocks.0.attention", "blocks.1.feed_forward", "classifier"} <= names.keys()


def test_without_dropout_a_passage_has_one_answer(model: BayesianTransformer, words: torch.Tensor):
    model.eval()
    assert torch.equal(model(words), model(words))


def test_padding_changes_nothing(model: BayesianTransformer):
    model.eval()
    short, padded = torch.tensor([[5, 6]]), torch.tensor([[5, 6, 0, 0, 0, 0]])
    torch.testing.assert_close(model(short), model(padded))


def test_the_order_of_the_words_matters(model: BayesianTransformer):
    model.eval()
    assert not torch.allclose(model(torch.tensor([[5, 6, 7]])), model(torch.tensor([[7, 6, 5]])))


def test_every_parameter_gets_a_gradient(model: BayesianTransformer, words: torch.Tensor):
    model(words).logsumexp(dim=-1).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_monte_carlo_passes_differ_with_only_dropout_training(model: BayesianTransformer, words: torch.Tensor):
    with monte_carlo_dropout(model.eval()):
        assert not torch.equal(model(words), model(words))
        training = {name for name, module in model.named_modules() if module.training}
    assert training == {name for name, module in model.named_modules() if isinstance(module, nn.Dropout)}


def test_afterwards_every_module_has_its_own_mode_again_even_after_an_error(model: BayesianTransformer):
    model.train()
    model.blocks[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(RuntimeError, match="boom"), monte_carlo_dropout(model):
        raise RuntimeError("boom")
    assert {name: module.training for name, module in model.named_modules()} == before
