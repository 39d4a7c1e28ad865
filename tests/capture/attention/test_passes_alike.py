"""What was worked out of one pass serves the next that is the same, and is never taken for one that only looks it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.capture.attention.attends import HEADS, LENGTH, WIDTH, Attends, scores
from tests.capture.attention.harness import capture_of, hooked
from torchprobe.capture.attention.labelling import Labelling


@pytest.fixture
def inputs():
    return torch.randn(2, LENGTH, WIDTH), torch.randn(2, LENGTH, WIDTH)


class Choosing(nn.Module):
    """The same functions of tensors of the same shapes in every pass; `self.way` decides of which."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.q, self.k, self.way, self.fused = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), 0, fused
        self.halves = nn.ModuleList([Inner(), Inner()])
        self.register_buffer("table", torch.randn(2, LENGTH, WIDTH))

    def forward(self, x, other):
        q, k = self.q(x), self.k(self.chosen(x, other))
        q, k = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k))
        return self.attend(q, k)

    def chosen(self, x, other):
        return (x, other)[self.way]

    def attend(self, q, k):
        if self.fused:
            return F.scaled_dot_product_attention(q, k, k)
        return scores(q, k).softmax(-1) @ k


class Inner(nn.Module):
    """Has no parameters: only the caller tells two of them apart."""

    def forward(self, q, k):
        return scores(q, k).softmax(-1) @ k


class OfAnotherModule(Choosing):
    def chosen(self, x, other):
        return x

    def attend(self, q, k):
        return self.halves[self.way](q, k)


class OfABuffer(Choosing):
    """Of activations it is an attention, of a buffer times a buffer it is none."""

    def forward(self, x, other):
        keys = (other, self.table)[self.way].unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return self.attend(keys * 1, keys * 2)


class OfAnotherOrder(Choosing):
    """Heads stand before or after the features of each: of the same size, so that every shape is the same."""

    def forward(self, x, other):
        q, k = (f(x).view(2, LENGTH, 4, 4) for f in (self.q, self.k))
        q, k = (t.permute((0, 2, 1, 3) if self.way else (0, 3, 1, 2)).contiguous() for t in (q, k))
        return self.attend(q, k)


class OfAnotherPlace(Choosing):
    """Queries are other tokens of the same sequence: distances change."""

    def chosen(self, x, other):
        return x

    def forward(self, x, other):
        start = (0, 3)[self.way]
        q, k = self.q(x)[:, start : start + 2], self.k(x)
        q, k = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k))
        return self.attend(q, k)


class OfTheSameTwice(Choosing):
    """Two arguments, which are one tensor in some passes."""

    def chosen(self, x, other):
        return other


KINDS = [Choosing, OfAnotherModule, OfABuffer, OfAnotherOrder, OfAnotherPlace]


def found_in(capture, model, *args):
    """Of each attention of a pass its module, whether it is across, and its rows."""
    with torch.no_grad(), hooked(model, capture):
        model(*args)
    assert not capture.source.gate.failed
    passes, capture.passes = capture.passes, []
    return [(site.module, site.cross, reading.rows) for one in passes for site, reading in one.readings.items()]


def equal_sites(found, alone):
    assert [site[:2] for site in found] == [site[:2] for site in alone]
    for (*_, rows), (*_, expected) in zip(found, alone, strict=True):
        torch.testing.assert_close(rows, expected, equal_nan=True)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_that_looks_like_the_one_before(kind, fused, inputs):
    """Each pass says what it says where it is the only one."""
    model = kind(fused)
    together = capture_of(model)
    for way in (0, 0, 1, 1, 0, 1):
        model.way = way
        equal_sites(found_in(together, model, *inputs), found_in(capture_of(model), model, *inputs))


@pytest.mark.parametrize("fused", [False, True])
def test_two_arguments_that_are_one_tensor_in_some_passes(fused, inputs):
    x, y = inputs
    model = OfTheSameTwice(fused)
    together = capture_of(model)
    for other in (y, x, x, y):
        equal_sites(found_in(together, model, x, other), found_in(capture_of(model), model, x, other))


def test_padding_is_that_of_each_pass(inputs):
    def weigh(self, q, k, kept):
        return scores(q, k).masked_fill(~kept[:, None, None], -math.inf).softmax(-1)

    model = Attends(weigh)
    together = capture_of(model)
    for lengths in ((7, 4), (7, 4), (3, 7), (7, 7)):
        kept = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
        equal_sites(found_in(together, model, inputs[0], kept), found_in(capture_of(model), model, inputs[0], kept))


def test_a_slice_whose_end_a_tensor_says(inputs):
    """It is not asked for its value, which would wait for a device."""

    class Ends(Choosing):
        def forward(self, x, other):
            end = torch.tensor(self.way)
            return self.attend(*(f(x[:, :end]).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k)))

    model = Ends(False)
    together = capture_of(model)
    for way in (5, 5, 3, 5):
        model.way = way
        equal_sites(found_in(together, model, *inputs), found_in(capture_of(model), model, *inputs))


@pytest.mark.parametrize("fused", [False, True])
def test_labels_are_worked_out_once(fused, inputs, monkeypatch):
    """Passes of two shapes in turn do not undo what was found out of each other."""
    model, made = Choosing(fused), []
    work_out = Labelling._made
    monkeypatch.setattr(Labelling, "_made", lambda self, node: made.append(node) or work_out(self, node))
    capture = capture_of(model)
    for length in (LENGTH, 4):
        found_in(capture, model, *(x[:, :length] for x in inputs))
    first = len(made)
    assert first > 0
    for length in (LENGTH, 4, 4, LENGTH):
        assert found_in(capture, model, *(x[:, :length] for x in inputs))
    assert len(made) == first


def test_nothing_of_a_pass_is_held_after_it(inputs):
    import gc
    from weakref import ref

    kept = []

    def weigh(self, q, k):
        weights = scores(q, k).softmax(-1)
        kept.append(ref(weights))
        return weights

    model = Attends(weigh)
    capture = capture_of(model)
    for _ in range(3):
        found_in(capture, model, inputs[0].clone())
    model.p = None
    gc.collect()
    assert [one() for one in kept] == [None] * 3
