"""A mask hides a key by what it adds to its logit."""

from __future__ import annotations

import pytest
import torch

from tests.capture.attention.attends import HEADS, LENGTH, Attends
from tests.capture.attention.harness import record
from tests.capture.attention.reference import assert_close, of_weights

CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
X = torch.randn(3, LENGTH, 16)
FAR = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs()
SCALED = {
    "divided": (lambda m, s: s.masked_fill(~CAUSAL, -1e4) / 8, CAUSAL),
    "multiplied": (lambda m, s: 0.3 * (s + (~CAUSAL) * -1e4), CAUSAL),
    "a temperature a head": (lambda m, s: torch.where(CAUSAL, s, -6e3).mul_(m.temperature), CAUSAL),
    "a temperature": (lambda m, s: s.masked_fill(~CAUSAL, -1e4) / torch.tensor(4.0), CAUSAL),
    "steep after it": (lambda m, s: s.masked_fill(~CAUSAL, -1e9) / 8 - 600 * FAR, CAUSAL),
    "steep alone": (lambda m, s: s / 8 - 600 * FAR, CAUSAL | True),
}


@pytest.mark.parametrize(("change", "seen"), SCALED.values(), ids=SCALED.keys())
def test_what_a_mask_hides_goes_by_what_it_adds_whatever_scales_it_after(change, seen):
    model = Attends(lambda m, q, k: change(m, q @ k.mT).softmax(-1), temperature=torch.full((HEADS, 1, 1), 0.4))
    assert_close(record(model, X).heads["root"], of_weights(model.p, seen=seen))
