"""Attention of Hugging Face models, as they are: each layer under its module's name, with its entropy.

The reference is the entropy, in float64, of what the same model returns for `output_attentions=True` in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchprobe
from torchprobe.capture.attention.sites import Sites
from torchprobe.testing import MemoryWriter

transformers = pytest.importorskip("transformers", reason="needs transformers")

BATCH, LENGTH, VOCABULARY = 2, 9, 99
BOTH = ("sdpa", "eager")
EAGER = ("eager",)  # the model refuses sdpa
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
SEQ2SEQ = {
    **{"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}
IMAGE = {"image_size": 16, "patch_size": 4, "num_channels": 3}


@dataclass(frozen=True)
class Family:
    """A model class by name, its configuration, what it is called with, and what it supports.

    returns_every: of how many attention modules in order the model returns the attention of the last only.
    """

    model: str
    config: str
    options: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]]
    implementations: tuple[str, ...] = BOTH
    tolerance: float = 1e-4
    returns_every: int = 1


def tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, LENGTH))


def text() -> dict[str, Tensor]:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, -3:] = 0
    return {"input_ids": tokens(), "attention_mask": mask}


def text_to_text() -> dict[str, Tensor]:
    return {**text(), "decoder_input_ids": tokens()[:, :7]}


def sound() -> dict[str, Tensor]:
    return {"input_features": torch.randn(BATCH, 8, 2 * LENGTH), "decoder_input_ids": tokens()[:, :7]}


def image(size: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.randn(BATCH, 3, size, size)}


FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel", "GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}, text
    ),
    "bert": Family("BertModel", "BertConfig", TEXT, text),
    "llama": Family("LlamaForCausalLM", "LlamaConfig", {**TEXT, "num_key_value_heads": 2}, text),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", GROUPED, text),
    "mixtral": Family("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4}, text),
    "gemma2": Family("Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "sliding_window": 4}, text, EAGER),
    "gemma3": Family("Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, "sliding_window": 4}, text),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        text_to_text,
        tolerance=1e-3,
    ),
    "bart": Family(
        "BartForConditionalGeneration", "BartConfig", {**SEQ2SEQ, "max_position_embeddings": 16}, text_to_text
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": LENGTH, "max_target_positions": 16},
        sound,
    ),
    "vit": Family("ViTModel", "ViTConfig", {**TEXT, **IMAGE}, image(16)),
    "swin": Family(
        "SwinModel",
        "SwinConfig",
        {**IMAGE, "image_size": 32, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        image(32),
        returns_every=2,  # the last block of each stage of two; in the first stage its windows are shifted
    ),
    "bloom": Family(
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        text,
        EAGER,
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM", "GptOssConfig", {**GROUPED, "num_local_experts": 4, "sliding_window": 4}, text, EAGER
    ),
}
CASES = [(family, implementation) for family in FAMILIES for implementation in FAMILIES[family].implementations]


def build(family: Family, implementation: str) -> nn.Module:
    """Without dropout, and with weights so large that no attention is near uniform."""
    config = getattr(transformers, family.config)(**family.options)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    model = getattr(transformers, family.model)._from_config(config, attn_implementation=implementation)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.25)
    return model


def train_step(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """One step as anyone would write it; what the model returned, and its weights after the step."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.manual_seed(2)
    output = model(**inputs)
    output[0].square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return [*tensors(output), *(parameter.detach() for parameter in model.parameters())]


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def attention_modules(model: nn.Module) -> list[str]:
    """The innermost modules that are called attention by their class."""
    names = [name for name, module in model.named_modules() if "Attention" in type(module).__name__]
    return [name for name in names if not any(other.startswith(f"{name}.") for other in names)]


def kind_of(name: str, model: nn.Module) -> str:
    """The field of the model's output that has a module's attention."""
    if not model.config.is_encoder_decoder:
        return "attentions"
    if name.endswith(("EncDecAttention", "encoder_attn")):
        return "cross_attentions"
    return "encoder_attentions" if "encoder" in name.split(".") else "decoder_attentions"


def returned(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
    """What a float64 model in evaluation returns for `output_attentions`, by field."""
    model.config._experts_implementation = "eager"  # the grouped product of mixtures of experts has no float64
    twin = model.double().eval()
    doubles = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    with torch.no_grad():
        output = twin(**doubles, output_attentions=True)
    fields = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
    return {field: output[field] for field in fields if output.get(field) is not None}


def mean_entropy(attention: Tensor, valid: Tensor | None) -> float:
    """Over valid queries, of the heads' mean; (batch, heads, queries, keys), with valid of (batch, queries)."""
    p = attention.double()
    entropy = -torch.where(p > 0, p * p.log(), 0).sum(-1).mean(1)
    return (entropy if valid is None else entropy[valid]).mean().item()


def references(family: Family, inputs: dict[str, Tensor], model: nn.Module) -> dict[str, float]:
    """Entropy by module. Only self-attention over the masked tokens has padded queries."""
    eager = build(family, "eager")
    eager.load_state_dict(model.state_dict())
    maps = returned(eager, inputs)
    mask = inputs.get("attention_mask")
    padded_in = {"attentions", "encoder_attentions"}
    found = {}
    for field, attentions in maps.items():
        names = [name for name in attention_modules(eager) if kind_of(name, eager) == field]
        names = names[family.returns_every - 1 :: family.returns_every]
        valid = None if mask is None or field not in padded_in else mask.bool()
        found |= {name: mean_entropy(x, valid) for name, x in zip(names, attentions, strict=True)}
    return found


def closest(values: dict[str, float]) -> float:
    """How far the two most similar values are apart."""
    return min(b - a for a, b in pairwise(sorted(values.values())))


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The module of every attention call that is recorded: sites merge their calls, so their number would hide."""
    found: list[str] = []
    add = Sites.add

    def spy(self, site, reading):
        found.append(site.module)
        add(self, site, reading)

    monkeypatch.setattr(Sites, "add", spy)
    return found


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_each_layers_entropy_is_that_of_the_attention_that_the_model_returns(name, implementation, calls):
    family = FAMILIES[name]
    model = build(family, implementation)
    inputs = family.inputs()
    expected = references(family, inputs, model)
    bare = train_step(copy.deepcopy(model), inputs)
    writer = MemoryWriter()
    with torchprobe.instrument(model, writer=writer, probes=[torchprobe.Attention(every=1, rows="all")]):
        watched = train_step(model, inputs)
    prefix = "attention_entropy/"
    found = {tag.removeprefix(prefix): writer.value(tag, 1) for tag in writer.tags() if tag.startswith(prefix)}
    assert closest(expected) > 2 * family.tolerance, "a layer under another one's name would go unnoticed"
    assert sorted(calls) == sorted(found) == sorted(attention_modules(model))
    assert {site: found[site] for site in expected} == pytest.approx(expected, abs=family.tolerance, rel=0)
    assert len(bare) == len(watched)
    assert all(torch.equal(a, b) for a, b in zip(bare, watched, strict=True))
