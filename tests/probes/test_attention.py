"""What the attention probe writes: tags, descriptions, pictures, cadence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchprobe
from tests.models import Transformer, inputs
from torchprobe.testing import MemoryWriter


def run(steps: int = 3, validate: bool = False, **options) -> MemoryWriter:
    model, writer = Transformer(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = torchprobe.Attention(**{"every": 1, **options})
    with torchprobe.instrument(model, writer=writer, probes=[probe]):
        for step in range(steps):
            ids = inputs("transformer", seed=step)
            F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
            if validate:
                with torch.no_grad():
                    model.eval()(ids)
                model.train()
    return writer


def dense(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    """Entropy of the first block's attention by hand: (heads,)."""
    block = model.blocks[0]
    x = block.ln1(model.embedding(ids))
    batch, length, _ = x.shape
    q, k, _ = block.attention.qkv(x).view(batch, length, 3, 4, -1).permute(2, 0, 3, 1, 4).double()
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    logits = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    p = logits.softmax(-1)
    return -torch.special.xlogy(p, p).sum(-1).mean((0, 2))


def test_entropies_are_those_of_the_softmax_that_nobody_returns():
    torch.manual_seed(1)
    expected = dense(Transformer(), inputs("transformer", seed=0)).detach()
    torch.manual_seed(1)
    writer = run(steps=1)
    assert writer.value("attention_entropy/blocks.0.attention") == pytest.approx(expected.mean().item(), abs=1e-5)
    assert writer.value("attention_entropy_min/blocks.0.attention") == pytest.approx(expected.min().item(), abs=1e-5)
    np.testing.assert_allclose(writer.value("attention_heads/entropy")[0], expected, atol=1e-5)


def test_heads_of_all_layers_are_one_tensor_and_the_overview_is_over_all():
    writer = run()
    heads = writer.value("attention_heads/max_logit", 3)
    assert heads.shape == (2, 4)
    assert writer.value("overview/attention_max_logit", 3) == pytest.approx(float(heads.max()))
    lowest = float(writer.value("attention_heads/entropy", 3).min())
    assert writer.value("overview/attention_entropy_min", 3) == pytest.approx(lowest)


def test_pictures_come_with_the_first_and_every_tenth_sampled_step():
    writer = run(steps=12)
    for tag in ("attention_heatmap/entropy", "attention_map/blocks.1.attention"):
        shown = [record.step for record in writer.records if tag in record.values]
        assert shown == [1, 11], tag
        assert writer.value(tag).pixels.shape[1] <= 640


def test_maps_have_a_cadence_of_their_own():
    writer = run(steps=4, maps_every=2)
    assert [r.step for r in writer.records if "attention_map/blocks.0.attention" in r.values] == [1, 2, 4]


def test_descriptions_say_exact_or_sampled_or_bound():
    exact, sampled = run(steps=1), run(steps=1, rows=5)
    assert "exact" in exact.records[0].descriptions["attention_entropy"]
    assert "sampled: 5 query rows" in sampled.records[0].descriptions["attention_entropy"]
    assert "lower bound" in sampled.records[0].descriptions["attention_max_logit"]


def test_validation_is_seen_only_when_asked_for():
    assert not any(tag.startswith("val/") for tag in run(validate=True).tags())
    asked = run(validate=True, eval=True)
    assert [step for step, _ in asked.scalars("val/attention_entropy/blocks.0.attention")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"rows": 0}, "rows=0"), ({"maps_every": 0}, "maps_every"), ({"map_layers": 0}, "map_layers")],
)
def test_wrong_arguments_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        torchprobe.Attention(**options)


def test_weights_without_logits_leave_the_largest_logit_out():
    """Gumbel noise is added within the function: only the weights are seen."""

    class Drawn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qk = nn.Linear(8, 16)

        def forward(self, x):
            q, k = self.qk(x).chunk(2, -1)
            return F.gumbel_softmax(q @ k.mT) @ x

    torch.manual_seed(1)
    model, writer = Drawn(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, probes=[torchprobe.Attention(every=1)]):
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(3, 5, 8)).square().mean().backward()
            optimizer.step()
    assert [step for step, _ in writer.scalars("attention_entropy/root")] == [1, 2]
    assert writer.value("overview/attention_entropy_min", 2) == writer.value("attention_entropy_min/root", 2)
    assert "overview/attention_max_logit" not in writer.tags()


def test_einsum_has_one_name_in_training_and_validation():
    """It is Python, which each mode on the stack calls once more; what may be compiled has one more in training."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qk = nn.Linear(8, 16)

        def forward(self, x):
            q, k = self.qk(x).chunk(2, -1)
            return torch.einsum("bqk,bkd->bqd", torch.einsum("bqd,bkd->bqk", q, k).softmax(-1), x)

    model, writer = Attention(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, probes=[torchprobe.Attention(every=1, eval=True)]):
        for _ in range(2):
            model(torch.randn(3, 5, 8)).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                model(torch.randn(3, 5, 8))
    names = {tag.partition("attention_entropy/")[2] for tag in writer.tags() if "attention_entropy/" in tag}
    assert names == {"root"}
    assert [step for step, _ in writer.scalars("val/attention_entropy/root")] == [1, 2]
