"""HuggingFace models with labels: calibration and uncertainty as computed from their logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torchprobe
from torchprobe.statistics import calibration
from torchprobe.testing import MemoryWriter

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def bert(kind: str, **options) -> nn.Module:
    return getattr(transformers, f"BertFor{kind}")(transformers.BertConfig(**SIZES, **options))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2))


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2))


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def same(p: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return p, y


def shifted(p: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return p[:, :-1], y[:, 1:]


FAMILIES = {
    "sequence classification": (lambda: bert("SequenceClassification", num_labels=3), (6,), 3, same),
    "token classification": (lambda: bert("TokenClassification", num_labels=3), (6, 9), 3, same),
    "masked language model": (lambda: bert("MaskedLM"), (6, 9), 40, same),
    "causal language model": (gpt2, (6, 9), 40, shifted),
    "causal language model with a loss of transformers": (llama, (6, 9), 40, shifted),
    "encoder and decoder": (t5, (6, 9), 40, same),
}


@pytest.mark.parametrize("labelled", [True, False], ids=["labels=", "functional loss"])
@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_and_entropy(family, labelled):
    make, shape, classes, align = FAMILIES[family]
    model, writer = make().train(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids, labels = torch.randint(1, 40, (6, 9)), torch.randint(0, classes, shape)
    labels.view(-1)[1] = -100
    probes = [torchprobe.Uncertainty(), torchprobe.Calibration()]
    with torchprobe.instrument(model, writer=writer, probes=probes, every=1):
        if labelled:
            out = model(input_ids=ids, labels=labels)
            out.loss.backward()
        else:
            more = {"decoder_input_ids": ids} if family == "encoder and decoder" else {}
            out = model(input_ids=ids, **more)
            p, y = align(out.logits, labels)
            nn.functional.cross_entropy(p.flatten(0, -2), y.flatten()).backward()
        optimizer.step()
    p, y = align(out.logits.detach().softmax(-1), labels)
    expected = calibration.summarise(calibration.compute(p.flatten(0, -2), y.flatten()).tolist())
    for key in ("count", "ece", "nll", "accuracy", "brier"):
        assert writer.value(f"calibration/{key}", 1) == pytest.approx(expected[key], rel=1e-5), key
    entropy = torch.special.entr(out.logits.detach().softmax(-1)).sum(-1).mean().item()
    assert writer.value("uncertainty_total/root", 1) == pytest.approx(entropy, rel=1e-5)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_heads_that_are_no_choice_of_one_class(problem):
    model, writer = bert("SequenceClassification", num_labels=3), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids, labels = torch.randint(1, 40, (6, 9)), torch.randint(0, 2, (6, 3)).float()
    model.config.problem_type = problem
    probes = [torchprobe.Uncertainty(), torchprobe.Calibration()]
    with torchprobe.instrument(model, writer=writer, probes=probes, every=1):
        out = model(input_ids=ids, labels=labels)
        out.loss.backward()
        optimizer.step()
    if problem == "regression":
        assert not any("uncertainty" in tag or "calibration" in tag for tag in writer.tags())
    else:
        expected = ((out.logits > 0) == labels).float().mean().item()
        assert writer.value("calibration/accuracy") == pytest.approx(expected)
