"""Attention of compiled Hugging Face models is that of the eager run."""

from __future__ import annotations

import copy

import pytest
import torch

import torchprobe
from tests.setups.compiled import COMPILERS_WARNINGS
from torchprobe.testing import MemoryWriter

transformers = pytest.importorskip("transformers", reason="needs transformers")

from tests.integrations.test_huggingface_attention import FAMILIES, build, train_step  # noqa: E402

pytestmark = COMPILERS_WARNINGS


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_compiled_models_attention_is_that_of_the_eager_run(name):
    model, inputs = build(FAMILIES[name], "sdpa"), {"input_ids": FAMILIES[name].inputs()["input_ids"]}
    writers = []
    for compiled in (False, True):
        twin, writer = copy.deepcopy(model), MemoryWriter()
        callee = torch.compile(twin, backend="aot_eager") if compiled else twin
        with torchprobe.instrument(twin, writer=writer, probes=[torchprobe.Attention(every=1, rows="all")]) as session:
            train_step(callee, inputs)
        assert "not seen" not in session.summary()
        writers.append(writer)
    eager, found = writers
    tags = [tag for tag in eager.tags() if tag.startswith("attention_")]
    assert len([tag for tag in tags if tag.startswith("attention_entropy/")]) == 2
    assert [tag for tag in found.tags() if tag.startswith("attention_")] == tags
    for tag in tags:
        if isinstance(eager.value(tag, 1), float):
            assert found.value(tag, 1) == pytest.approx(eager.value(tag, 1), abs=1e-4), tag


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_padded_batches_of_a_compiled_model_are_not_recorded_and_it_is_said(name):
    """Their masks do not tell which queries are padding; outside of graphs the model's `attention_mask` does."""
    model, writer = build(FAMILIES[name], "sdpa"), MemoryWriter()
    probes = [torchprobe.Attention(every=1, rows="all")]
    with torchprobe.instrument(model, writer=writer, probes=probes) as session:
        train_step(torch.compile(model, backend="aot_eager"), FAMILIES[name].inputs())
        said = session.summary()
    assert not [tag for tag in writer.tags() if tag.startswith("attention_")]
    assert "does not tell which queries are padding" in said
