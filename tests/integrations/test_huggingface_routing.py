"""Mixtures of experts of Hugging Face models: what their routers put out, recomputed in float64 by hooks of our own."""

from __future__ import annotations

import pytest
import torch

import torchprobe
from torchprobe.testing import MemoryWriter

transformers = pytest.importorskip("transformers", reason="needs transformers")

TEXT = {
    **{"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0},
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = {**TEXT, **EXPERTS, **MLA, "n_routed_experts": 8, "n_shared_experts": 1, "num_key_value_heads": 4}
GROUPED = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 0}
FAMILIES = {
    "Mixtral": ("MixtralForCausalLM", {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}, "softmax"),
    "Qwen2Moe": (
        "Qwen2MoeForCausalLM",
        {**TEXT, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
        "softmax",
    ),
    "Qwen3Moe": ("Qwen3MoeForCausalLM", {**TEXT, **EXPERTS, "num_experts": 6, "decoder_sparse_step": 1}, "softmax"),
    "DeepseekV2": ("DeepseekV2ForCausalLM", {**DEEPSEEK, "first_k_dense_replace": 0}, "softmax"),
    "DeepseekV3": ("DeepseekV3ForCausalLM", {**DEEPSEEK, **GROUPED}, "sigmoid"),
    "Olmoe": ("OlmoeForCausalLM", {**TEXT, "num_experts": 4, "num_experts_per_tok": 2}, "softmax"),
    "GptOss": ("GptOssForCausalLM", {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}, "softmax"),
    "Switch": (
        "SwitchTransformersForConditionalGeneration",
        {
            **{"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_sparse_encoder_layers": 1},
            **{"num_decoder_layers": 2, "num_sparse_decoder_layers": 1, "num_heads": 4, "num_experts": 4},
            **{"expert_capacity": 2, "pad_token_id": 0, "decoder_start_token_id": 0},
        },
        "softmax",
    ),
}


def made(family):
    name, options, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, name)
    return model(model.config_class(**options)).train()


def is_router(module):
    return "router" in type(module).__name__.lower()


def expected(outputs, reading):
    """Of one router's outputs in a pass: load, entropy, dropped."""
    logits = next(part for part in outputs if part.is_floating_point() and part.shape[-1] > 2).detach().double()
    choices = next(part for part in outputs if not part.is_floating_point())
    logits, choices = logits.flatten(0, -2), choices.flatten(0, -2)
    one_hot = choices.shape == logits.shape
    taken = choices if one_hot else torch.nn.functional.one_hot(choices, logits.shape[-1]).sum(1)
    shares = logits.softmax(-1) if reading == "softmax" else logits.sigmoid()
    mean = (shares / shares.sum(-1, keepdim=True)).mean(0)
    return taken.double().mean(0), -(mean * mean.log()).sum(), (taken.sum(-1) == 0).double().mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_router_of_the_family_is_recorded(family):
    model, writer, seen = made(family), MemoryWriter(), {}
    for name, module in model.named_modules():
        if is_router(module):
            module.register_forward_hook(lambda _, args, output, name=name: seen.__setitem__(name, output))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ids = torch.randint(1, 99, (3, 7), generator=torch.Generator().manual_seed(1))
    with torchprobe.instrument(model, writer=writer, probes=[torchprobe.Routing(every=1)], rules=[]) as session:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert len(seen) >= 2
    for name, outputs in seen.items():
        load, entropy, dropped = expected(outputs, FAMILIES[family][2])
        assert writer.value(f"router_load/{name}") == pytest.approx(load.numpy(), rel=1e-5)
        assert writer.value(f"router_entropy/{name}") == pytest.approx(entropy.item(), rel=1e-4)
        assert writer.value(f"router_dropped/{name}") == pytest.approx(dropped.item())
    assert {tag for tag in writer.tags() if tag.startswith("router_load/")} == {f"router_load/{n}" for n in seen}
    assert "router_load" not in session.summary()
    if family == "Switch":
        assert max(writer.value(f"router_dropped/{name}") for name in seen) > 0
