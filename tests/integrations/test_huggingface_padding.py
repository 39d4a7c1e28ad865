"""A padded batch has the attention of its sequences, each run alone and unpadded, whichever side is padded.

The reference is not `output_attentions` of a padded float64 model: there libraries cast the mask's lowest float64 to
float32, a row that sees nothing becomes NaN, and from the second layer on NaN keys spoil every row of the sequence.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torchprobe

pytest.importorskip("transformers", reason="needs transformers")

from tests.integrations.test_huggingface_attention import (
    BOTH,
    GROUPED,
    TEXT,
    VOCABULARY,
    Family,
    attention_modules,
    build,
)
from torchprobe.testing import MemoryWriter

LENGTH, PADS = 9, (0, 3, 5)
CLIP = {**TEXT, "projection_dim": 32, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 98}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}


def family(model: str, config: str, options: dict) -> Family:
    return Family(model, config, options, dict)


FAMILIES = {
    "gpt2": family("GPT2LMHeadModel", "GPT2Config", GPT2),
    "bert": family("BertModel", "BertConfig", TEXT),
    "llama": family("LlamaForCausalLM", "LlamaConfig", {**TEXT, "num_key_value_heads": 2}),
    "qwen3": family("Qwen3ForCausalLM", "Qwen3Config", GROUPED),
    "gemma3": family("Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, "sliding_window": 4}),
    "phi": family("PhiForCausalLM", "PhiConfig", {**TEXT, "partial_rotary_factor": 0.5}),
    "clip": family("CLIPTextModel", "CLIPTextConfig", CLIP),
}


def real_tokens(side: str) -> Tensor:
    position = torch.arange(LENGTH)
    pads = torch.tensor(PADS)[:, None]
    return position >= pads if side == "left" else position < LENGTH - pads


def alone(model: nn.Module, ids: Tensor, real: Tensor) -> list[float]:
    """Entropy of each layer, mean over real queries and heads: each sequence unpadded, at its positions, in float64."""
    model.config._experts_implementation = "eager"
    twin = model.double().eval()
    sums, count = torch.zeros(model.config.num_hidden_layers, dtype=torch.float64), 0
    for row, kept in zip(ids, real, strict=True):
        at = kept.nonzero()[:, 0]
        with torch.no_grad():
            output = twin(input_ids=row[kept][None], position_ids=at[None], output_attentions=True)
        entropies = [torch.special.entr(p.double()).sum(-1).mean(1).sum() for p in output.attentions]
        assert all(entropy.isfinite() for entropy in entropies)
        sums, count = sums + torch.stack(entropies), count + len(at)
    return (sums / count).tolist()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("name", FAMILIES)
def test_padding_changes_no_layers_entropy(name, implementation, side):
    torch.manual_seed(1)
    ids, real = torch.randint(3, 90, (len(PADS), LENGTH)), real_tokens(side)
    model = build(FAMILIES[name], implementation)
    eager = build(FAMILIES[name], "eager")
    eager.load_state_dict(model.state_dict())
    expected = alone(eager, ids, real)
    writer = MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with torchprobe.instrument(model, writer=writer, probes=[torchprobe.Attention(every=1, rows="all")]):
        model.train()(input_ids=ids, attention_mask=real.long())[0].square().mean().backward()
        optimizer.step()
    found = [writer.value(f"attention_entropy/{site}", 1) for site in attention_modules(model)]
    assert found == pytest.approx(expected, abs=1e-4, rel=0)
    assert abs(expected[0] - expected[1]) > 2e-4, "a layer under another one's name would go unnoticed"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_after_a_learned_prompt_is_left_out(implementation):
    """PEFT puts the prompt, one for all sequences, before their tokens, and ones of floats before their mask."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(build(FAMILIES["llama"], implementation), config)
    ids, real = torch.randint(3, VOCABULARY, (len(PADS), LENGTH)), real_tokens("right")
    writer = MemoryWriter()
    with torchprobe.instrument(model, writer=writer, probes=[torchprobe.Attention(every=1)], rules=[]):
        model(input_ids=ids, attention_mask=real.long()).logits.sum().backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.0).step()
    found = [writer.value(tag) for tag in writer.tags() if tag.startswith("attention_distance/")]
    model.base_model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(input_ids=ids, attention_mask=real.long(), output_attentions=True).attentions
    rows = torch.cat((torch.ones(len(PADS), 3, dtype=torch.bool), real), 1)
    place = torch.arange(rows.size(1))
    away = [(p * (place[:, None] - place).abs()).sum(-1).mean(1)[rows].mean().item() for p in weights]
    assert found == pytest.approx(away, abs=1e-4)
