"""Models in evaluation keep their fused paths, and are seen where they have none."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules import module as nn_module

from tests.capture.attention.harness import capture_of, hooked, record, recorded
from tests.capture.attention.passes import depth

# ---- evaluation


def encoder() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fused_path_of_an_encoder_in_evaluation_is_kept():
    model = encoder().eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        seen = record(model, x, src_key_padding_mask=padding)
    assert torch.equal(seen.output, expected)
    assert seen.uncovered == {"the fused path of nn.TransformerEncoder in evaluation": 1}
    assert nn_module._global_forward_pre_hooks == {}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_frozen_encoder_inside_a_model_in_training_keeps_its_fused_path():
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text = encoder().requires_grad_(False).eval()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x, padding):
            with torch.no_grad():
                memory = self.text(x, src_key_padding_mask=padding)
            return self.attention(x[:, :3], memory, memory)[0], memory

    model, x = Frozen(), torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = model(x, padding)
    seen = record(model, x, padding)
    assert all(torch.equal(a, b) for a, b in zip(seen.output, expected, strict=True))
    assert list(seen.heads) == ["attention"]


def test_the_fused_path_of_multi_head_attention_is_kept_and_cross_attention_is_seen():
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True).eval()
    x, y = torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    with torch.no_grad():
        expected = model(x, y)
        seen = record(model, x, y)
    assert torch.equal(seen.output, expected)
    assert list(seen.heads) == ["decoder.layers.0.multihead_attn"]


def test_an_exception_in_a_fused_module_leaves_no_hook():
    model = nn.Sequential(encoder()).eval()
    capture = capture_of(model)
    with torch.no_grad(), hooked(model, capture), pytest.raises(RuntimeError, match="embed_dim"):
        model(torch.randn(2, 5, 7))
    assert depth() == 0
    assert nn_module._global_forward_pre_hooks == {}


def test_evaluation_with_gradients_has_no_fused_path_and_is_seen():
    model = encoder().eval()
    seen = record(model, torch.randn(2, 5, 8))
    assert list(seen.heads) == ["layers.0.self_attn", "layers.1.self_attn"]


def test_a_session_that_enters_without_gradients_says_how_the_pass_runs():
    model = nn.Sequential(encoder()).eval()
    capture = capture_of(model)
    with torch.no_grad():
        capture.enter(model[0], grad_enabled=True)
    model[0](torch.randn(2, 5, 8))
    capture.leave()
    assert list(recorded(capture).heads) == ["0.layers.0.self_attn", "0.layers.1.self_attn"]
