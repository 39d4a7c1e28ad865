"""Attention inside compiled graphs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import torchprobe
from tests.capture.attention.test_places import LOOPS, TWINS
from tests.setups.compiled import (
    COMPILERS_WARNINGS,
    NEEDS_GRADIENTS,
    OLDER,
    assert_same_values,
)
from torchprobe.capture.attention import dot_product
from torchprobe.testing import MemoryWriter

pytestmark = [OLDER, *COMPILERS_WARNINGS]


@pytest.fixture(autouse=True)
def fresh_counters():
    counters.clear()


@NEEDS_GRADIENTS
def test_multi_head_attention_and_padding_in_a_compiled_model():
    def passes(compiled: bool) -> MemoryWriter:
        torch.manual_seed(2)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        model, writer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), MemoryWriter()
        if compiled:
            model.compile(backend="eager", fullgraph=True)
        padding = torch.tensor([[False] * 5, [False, False, False, True, True]])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torchprobe.instrument(model, writer=writer, every=1):
            for step in range(2):
                x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(step))
                model(x, src_key_padding_mask=padding)[~padding].square().mean().backward()
                optimizer.step()
        return writer

    expected = passes(compiled=False)
    assert "attention_entropy/layers.1.self_attn" in expected.tags()
    assert_same_values(passes(compiled=True), expected)


def masks(name: str, queries: int) -> dict[str, torch.Tensor]:
    """Of 2 sequences and 4 keys."""
    padding = torch.tensor([[False] * 4, [False, False, True, True]])
    forbidden = torch.triu(torch.ones(queries, 4, dtype=torch.bool), 1)
    return {"none": {}, "padding": {"key_padding_mask": padding}, "mask": {"attn_mask": forbidden}}[name]


@pytest.mark.parametrize(
    ("options", "masked", "batched", "queries"),
    [
        ({"add_bias_kv": True}, "padding", True, 4),
        ({"add_zero_attn": True}, "padding", True, 5),  # as many as there are keys with the added one
        ({"add_bias_kv": True, "add_zero_attn": True}, "mask", True, 3),
        ({"add_bias_kv": True, "add_zero_attn": True}, "padding", False, 4),
    ],
)
def test_keys_that_multi_head_attention_adds_count_in_compiled_models_too(options, masked, batched, queries):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

        def forward(self, q, k):
            given = masks(masked, queries)
            if batched:
                return self.attention(q, k, k, **given)[0]
            given = {name: mask[1] if name == "key_padding_mask" else mask for name, mask in given.items()}
            return self.attention(q[0], k[0], k[0], **given)[0]

    def passes(compiled: bool) -> MemoryWriter:
        torch.manual_seed(2)
        model, writer = Model(), MemoryWriter()
        run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        with torchprobe.instrument(model, writer=writer, probes=[torchprobe.Attention(every=1)]):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for step in range(2):
                generator = torch.Generator().manual_seed(step)
                k = torch.randn(2, 4, 8, generator=generator)
                q = k if queries == 4 else torch.randn(2, queries, 8, generator=generator)
                run(q, k).square().mean().backward()
                optimizer.step()
        return writer

    expected = passes(compiled=False)
    assert "attention_entropy/attention" in expected.tags()
    assert_same_values(passes(compiled=True), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_shapes_of_no_known_form_are_told_of_and_the_others_go_on(compiled, monkeypatch):
    query_key = dot_product.query_key

    def of_few(call, heads):
        if call["query"].dim() == 3:
            raise ValueError("mask: got another shape")
        return query_key(call, heads)

    monkeypatch.setattr(dot_product, "query_key", of_few)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            unknown = F.scaled_dot_product_attention(x, x, x * self.scale)[None]
            return F.scaled_dot_product_attention(unknown, unknown, unknown)

    torch.manual_seed(2)
    model, writer = Attention(), MemoryWriter()
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, probes=[torchprobe.Attention(every=1)]) as session:
        run(torch.randn(3, 5, 4)).square().mean().backward()
        optimizer.step()
        session.flush()
        assert "calls in root, whose shapes are of no known form" in str(session.summary())
    assert len(writer.scalars("attention_entropy/root")) == 1


def prefixed(m, x):
    k = torch.cat((m.prefix.expand(len(x), -1, -1), m.k(x)), 1)
    return F.scaled_dot_product_attention(m.q(x)[:, None], k[:, None], k[:, None])


def last_alone(m, x):
    return F.scaled_dot_product_attention(m.q(x)[:, None, -1:], m.k(x)[:, None], x[:, None])


def every_other(m, x):
    return m.attention(x[:, ::2], x, x)[0]


def of_others(m, x):
    return m.attention(m.latents.expand(len(x), -1, -1), x, x)[0]


@pytest.mark.parametrize("attend", [prefixed, last_alone, every_other, of_others])
def test_queries_stand_among_other_numbers_of_keys_where_they_do_outside_of_graphs(attend):
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.prefix = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.randn(3, 8))
            self.attention, self.latents = (
                nn.MultiheadAttention(8, 2, batch_first=True),
                nn.Parameter(torch.randn(4, 8)),
            )

        def forward(self, x):
            return attend(self, x) if F.scaled_dot_product_attention else x  # its code names it

    assert_same_values(*(_tags_of(Attention, compiled) for compiled in (True, False)))


def test_steps_of_a_compiled_decoder_stand_where_it_is_not_known():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(8, 8)

        def forward(self, x):
            state = x.mean(1)
            for _ in range(3):
                state = self.cell(F.scaled_dot_product_attention(state[:, None, None], x[:, None], x[:, None])[:, 0, 0])
            return state

    writer = _tags_of(Attention, True)
    assert "attention_entropy/root" in writer.tags()
    assert "attention_distance/root" not in writer.tags()


def _tags_of(make: type[nn.Module], compiled: bool) -> MemoryWriter:
    torch.manual_seed(2)
    model, writer = make(), MemoryWriter()
    run = torch.compile(model, backend="eager") if compiled else model
    with torchprobe.instrument(model, writer=writer, probes=[torchprobe.Attention(every=1)], rules=[]):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            run(torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
    return writer


@pytest.mark.parametrize("run", [*TWINS, LOOPS["comprehension"], LOOPS["nested"]])
def test_loops_on_one_line_are_told_apart_in_graphs_too(run):
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return torch.stack(run(self.layer(x)))

    expected = _tags_of(Attention, compiled=False)
    assert ("attention_entropy/root/2" in expected.tags()) == (run in TWINS)
    assert_same_values(_tags_of(Attention, compiled=True), expected)


class Mixer(nn.Module):
    """Nothing but its code says what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)


class ByList(Mixer):
    def forward(self, x):
        return torch.cat([F.scaled_dot_product_attention(one, one, one) for one in self.layer(x).split(1)])


class ByGenerator(Mixer):
    def forward(self, x):
        return sum(F.scaled_dot_product_attention(one, one, one) for one in self.layer(x).split(1))


class ByLambda(Mixer):
    def forward(self, x):
        attend = lambda one: F.scaled_dot_product_attention(one, one, one)  # noqa: E731
        return attend(self.layer(x))


@pytest.mark.parametrize("kind", [ByList, ByGenerator, ByLambda])
def test_attention_is_found_in_code_within_a_method(kind):
    assert_same_values(*(_tags_of(kind, compiled) for compiled in (True, False)))
