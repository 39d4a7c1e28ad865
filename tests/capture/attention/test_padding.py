"""Padded queries are told by masks that name padding, and by nothing else."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.capture.attention.attends import HEADS, LENGTH, Attends, scores
from tests.capture.attention.harness import record
from tests.capture.attention.reference import assert_close, of_weights
from torchprobe import Attention, instrument
from torchprobe.testing import MemoryWriter

TAKEN = torch.arange(LENGTH) < torch.tensor([LENGTH, 4, 2])[:, None]
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
X = torch.randn(3, LENGTH, 16)


def filled(s, hidden):
    return s.masked_fill(hidden, -math.inf)


def added(s, hidden):
    return s + torch.zeros(hidden.shape).masked_fill(hidden, -1e9)


def chosen(s, hidden):
    return torch.where(hidden, torch.tensor(-1e4), s)


def chosen_the_other_way(s, hidden):
    return torch.where(~hidden, s, -1e6)


@pytest.mark.parametrize("hide", [filled, added, chosen, chosen_the_other_way])
def test_a_mask_that_is_one_for_all_queries_names_padding(hide):
    model = Attends(lambda m, q, k: hide(scores(q, k), ~TAKEN[:, None, None]).softmax(-1))
    assert_close(record(model, X).heads["root"], of_weights(model.p, TAKEN[:, None], TAKEN[:, None, None]))


def test_it_names_it_beside_a_causal_mask_too():
    seen = TAKEN[:, None, None] & CAUSAL
    model = Attends(lambda m, q, k: filled(filled(scores(q, k), ~CAUSAL), ~TAKEN[:, None, None]).softmax(-1))
    assert_close(record(model, X).heads["root"], of_weights(model.p, TAKEN[:, None], seen))


@pytest.mark.parametrize("extra", ["null", "behind", "none"])
def test_padding_goes_with_the_tokens_whatever_other_keys_there_are(extra):
    """A mask of the keys tells the padded queries, where learned or null keys stand beside them."""

    class Memory(Attends):
        def forward(self, x):
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            more = {"null": torch.zeros(3, HEADS, 1, 8), "behind": self.memory.expand(3, -1, -1, -1)}.get(extra)
            k, v = ((t if more is None else torch.cat((t, more), 2)) for t in (k, v))
            self.seen = F.pad(TAKEN, (0, k.size(2) - LENGTH), value=True)[:, None, None]
            self.p = filled(q @ k.mT, ~self.seen).softmax(-1)
            return self.p @ v

    model = Memory(None, memory=nn.Parameter(torch.randn(HEADS, 2, 8)))
    seen = record(model, X)
    assert_close(seen.heads["root"], of_weights(model.p, TAKEN[:, None], model.seen))


@pytest.mark.parametrize(
    "mask",
    [
        CAUSAL.tril(-1),
        CAUSAL & (torch.arange(LENGTH) % 2 == 0),
        torch.ones(LENGTH, LENGTH, dtype=torch.bool) & (torch.arange(LENGTH) != 3),
        torch.eye(LENGTH, dtype=torch.bool).roll(1, 0),
        (torch.arange(LENGTH) < 3).expand(3, 1, 1, LENGTH),
        torch.stack([CAUSAL, CAUSAL.mT])[None],
        (TAKEN[:, None] & CAUSAL)[:, None],
    ],
    ids=["strictly causal", "strided", "a key nobody sees", "another each", "one for the batch", "heads", "of queries"],
)
def test_no_other_mask_makes_a_query_padding(mask):
    model = Attends(lambda m, q, k: filled(scores(q, k), ~mask).softmax(-1).nan_to_num())
    rows = mask.expand(3, HEADS, LENGTH, LENGTH).any(-1)
    assert_close(record(model, X).heads["root"], of_weights(model.p, rows, mask))


def test_queries_that_see_nothing_by_any_mask_are_left_out_of_cross_attention_by_their_own():
    """Padded queries of a decoder are known from its self-attention."""
    layer = nn.TransformerDecoderLayer(16, HEADS, 16, 0.0, batch_first=True)
    memory = torch.randn(3, 5, 16)
    seen = record(layer, X, memory, tgt_key_padding_mask=~TAKEN)
    assert [head["rows"] for head in seen.heads["multihead_attn"]] == [TAKEN.sum().item()] * HEADS
    assert [head["rows"] for head in seen.heads["self_attn"]] == [TAKEN.sum().item()] * HEADS


class Inner(Attends):
    """Hands its mask on in another form, as libraries do."""

    def forward(self, x, attention_mask=None, key_padding_mask=None):
        seen = attention_mask.bool() if attention_mask is not None else ~key_padding_mask
        return super().forward(x, seen[:, None, None] & CAUSAL)


class Outer(nn.Module):
    def __init__(self, name) -> None:
        super().__init__()
        self.inner, self.name = Inner(lambda m, q, k, mask: filled(scores(q, k), ~mask).softmax(-1)), name

    def forward(self, x, taken):
        return self.inner(x, **{self.name: taken if self.name == "attention_mask" else taken == 0})


@pytest.mark.parametrize("name", ["attention_mask", "key_padding_mask"])
@pytest.mark.parametrize("training", [True, False])
def test_an_argument_of_a_module_around_the_call_names_padding(name, training):
    model, writer = Outer(name), MemoryWriter()
    with instrument(model, writer=writer, probes=[Attention(every=1, eval=True)]) as session:
        with torch.set_grad_enabled(training):
            y = model.train(training)(X, TAKEN.long())
        if training:
            optimizer = torch.optim.SGD(model.parameters(), 0.0)
            y.sum().backward()
            optimizer.step()
        session.flush()
    heads = of_weights(model.inner.p, TAKEN[:, None], TAKEN[:, None, None] & CAUSAL)
    prefix = "" if training else "val/"
    for tag, name in (("attention_entropy", "entropy"), ("attention_sink", "sink"), ("attention_distance", "distance")):
        assert writer.value(f"{prefix}{tag}/inner") == pytest.approx(sum(h[name] for h in heads) / HEADS, abs=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())


class Inverted(nn.Module):
    """Calls what is true of padding `attention_mask`, as GroundingDINO's text enhancer does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Attends(lambda m, q, k, hidden: filled(scores(q, k), hidden).softmax(-1))
        self.second = Attends(lambda m, q, k: filled(scores(q, k), ~CAUSAL).softmax(-1))

    def forward(self, x, attention_mask):
        return self.first(x, attention_mask[:, None, None]), self.second(x)


def assert_recorded(model, mask, **right):
    """right: weights, counted queries and visible keys, by module."""
    writer = MemoryWriter()
    with instrument(model, writer=writer, probes=[Attention(every=1)]):
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        outputs = model(X, mask)
        sum(one.nan_to_num().sum() for one in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
        optimizer.step()
    for name, (p, rows, seen) in right.items():
        heads = of_weights(p(), rows, seen)
        for tag in ("entropy", "sink", "distance"):
            want = sum(head[tag] for head in heads) / HEADS
            assert writer.value(f"attention_{tag}/{name}") == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("taken", [TAKEN, torch.ones_like(TAKEN)], ids=["of several lengths", "of one"])
def test_an_argument_that_means_the_opposite_of_its_name_is_not_believed(taken):
    model = Inverted()
    first = (lambda: model.first.p, taken[:, None], taken[:, None, None])
    assert_recorded(model, ~taken, first=first, second=(lambda: model.second.p, taken[:, None], CAUSAL))


def test_a_sequence_of_nothing_but_padding_is_left_out():
    taken = TAKEN.clone()
    taken[1] = False
    model = Outer("attention_mask")
    inner = (lambda: model.inner.p.nan_to_num(), taken[:, None], taken[:, None, None] & CAUSAL)
    assert_recorded(model, taken.long(), inner=inner)
