"""Nothing of the user's is kept alive while hand-written attention is followed."""

from __future__ import annotations

import weakref

import torch

from tests.capture.attention.harness import record
from tests.capture.attention.test_handwritten import LENGTH, WIDTH, Written


def test_logits_are_not_kept_alive():
    alive = []

    def attend(q, k, v):
        scores = q @ k.mT
        logits = weakref.ref(scores)
        scores = scores.softmax(-1)
        alive.append(logits() is not None)
        result = scores @ v
        weights = weakref.ref(scores)
        del scores
        alive.append(weights() is not None)
        return result

    model, x = Written(attend), torch.randn(2, LENGTH, WIDTH)
    with torch.no_grad():
        model(x)
        record(model, x)
    assert alive == [False] * 4


def test_locals_that_a_function_asked_for_stay():
    def attend(q, k, v):
        mine = locals()
        result = (q @ k.mT).softmax(-1) @ v
        assert mine["q"] is q
        return result

    class Local(Written):
        def forward(self, x):
            mine = locals()
            y = super().forward(x)
            assert mine["x"] is x
            return y

    assert record(Local(attend), torch.randn(2, LENGTH, WIDTH)).of("rows")
