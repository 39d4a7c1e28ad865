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


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("hide", [filled, added, "folded", "fused"])
def test_it_may_be_written_for_each_query_and_head(hide, heads):
    class Written(Attends):
        def forward(self, x):
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            hidden = ~TAKEN[:, None, None].expand(3, heads, LENGTH, LENGTH).contiguous()
            self.p = filled(scores(q, k), hidden).softmax(-1)
            if hide == "fused":
                return F.scaled_dot_product_attention(q, k, v, ~hidden)
            if hide == "folded":
                s = scores(q.flatten(0, 1), k.flatten(0, 1))
                return filled(s, hidden.expand(-1, HEADS, -1, -1).flatten(0, 1)).softmax(-1) @ v.flatten(0, 1)
            return hide(scores(q, k), hidden).softmax(-1) @ v

    model = Written(None)
    assert_close(record(model, X).heads["root"], of_weights(model.p, TAKEN[:, None], TAKEN[:, None, None]))


def test_a_mask_of_queries_after_it_takes_nothing_of_it_back():
    class Twice(Attends):
        def forward(self, x):
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            seen = TAKEN[:, None, None]
            y = F.scaled_dot_product_attention(q, k, v, seen)
            self.p = filled(scores(q, k), ~(seen & CAUSAL)).softmax(-1)
            return y + self.p @ v

    model = Twice(None)
    found = record(model, X).heads["root/2"]
    assert_close(found, of_weights(model.p, TAKEN[:, None], TAKEN[:, None, None] & CAUSAL))


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
        return super().forward(x, seen[:, None, None] & torch.ones(x.size(1), x.size(1), dtype=torch.bool).tril())


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
    """right: weights, counted queries and visible keys, or what tells them afterwards, by module."""
    writer = MemoryWriter()
    with instrument(model, writer=writer, probes=[Attention(every=1)]):
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        outputs = model(X, mask)
        sum(one.nan_to_num().sum() for one in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
        optimizer.step()
    for name, (p, rows, seen) in right.items():
        heads = of_weights(p(), *(one() if callable(one) else one for one in (rows, seen)))
        for tag in ("entropy", "sink", "distance"):
            want = sum(head[tag] for head in heads) / HEADS
            assert writer.value(f"attention_{tag}/{name}") == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("taken", [TAKEN, torch.ones_like(TAKEN)], ids=["of several lengths", "of one"])
def test_an_argument_that_means_the_opposite_of_its_name_is_not_believed(taken):
    model = Inverted()
    first = (lambda: model.first.p, taken[:, None], taken[:, None, None])
    assert_recorded(model, ~taken, first=first, second=(lambda: model.second.p, taken[:, None], CAUSAL))


class EachAlone(nn.Module):
    """Attention over one sequence of the batch after the other, or over the heads of each."""

    def __init__(self, size) -> None:
        super().__init__()
        self.inner, self.size = Attends(None), size

    def forward(self, x, attention_mask):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.inner.qkv(x).chunk(3, -1))
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        hidden = ~attention_mask.repeat_interleave(HEADS, 0)[:, None]
        parts = [slice(i, i + self.size) for i in range(0, len(q), self.size)]
        weights = [filled(scores(q[one], k[one]), hidden[one]).softmax(-1) for one in parts]
        self.p = torch.cat(weights).unflatten(0, (-1, HEADS)).detach()
        return torch.cat([w @ v[one] for w, one in zip(weights, parts, strict=True)])


@pytest.mark.parametrize("size", [1, HEADS, 2 * HEADS])
def test_padded_queries_of_one_sequence_in_a_batch_are_known(size):
    model = EachAlone(size)
    assert_recorded(model, TAKEN, root=(lambda: model.p, TAKEN[:, None], TAKEN[:, None, None]))


def test_a_sequence_of_nothing_but_padding_is_left_out():
    taken = TAKEN.clone()
    taken[1] = False
    model = Outer("attention_mask")
    inner = (lambda: model.inner.p.nan_to_num(), taken[:, None], taken[:, None, None] & CAUSAL)
    assert_recorded(model, taken.long(), inner=inner)


def shifted(x):
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, :-1].clone()
    return y


JOINED = {
    "learned tokens before": lambda x, one: torch.cat((one.expand(len(x), -1, -1), x), 1),
    "moved by a constant": lambda x, one: torch.cat((one[:, :1].expand(len(x), -1, -1), x[:, :-1]), 1),
    "moved in place": lambda x, one: shifted(x),
    "in another order": lambda x, one: torch.cat((x[:, 4:], x[:, :4]), 1),
    "with a sequence of its own": lambda x, one: torch.cat((x[:, :3].flip(2) * 2, x), 1),
    "a part": lambda x, one: x[:, 1:],
    "twice": lambda x, one: torch.cat((x, -x)),
    "of a batch of batches": lambda x, one: x[None].expand(2, -1, -1, -1).reshape(2, 3, LENGTH, -1).flatten(0, 1),
    "of fewer": lambda x, one: x[1:],
}


class Joins(nn.Module):
    """Makes another sequence of its tokens and of their mask, before a module takes both."""

    def __init__(self, join, name) -> None:
        super().__init__()
        self.inner, self.join, self.name = (
            Inner(lambda m, q, k, mask: filled(scores(q, k), ~mask).softmax(-1)),
            join,
            name,
        )
        self.one, self.taken = nn.Parameter(torch.randn(1, 2, 16)), TAKEN

    def forward(self, x, taken):
        self.taken = self.join(taken[..., None].float(), torch.ones(1, 2, 1))[..., 0] != 0
        mask = self.taken.long() if self.name == "attention_mask" else ~self.taken
        return self.inner(self.join(x, self.one), **{self.name: mask})


@pytest.mark.parametrize("name", ["attention_mask", "key_padding_mask"])
@pytest.mark.parametrize("how", JOINED)
def test_an_argument_names_the_padding_of_what_was_joined_moved_or_folded(how, name):
    model = Joins(JOINED[how], name)

    def seen():
        return model.taken[:, None, None] & torch.ones(2 * [model.taken.size(1)], dtype=torch.bool).tril()

    assert_recorded(model, TAKEN, inner=(lambda: model.inner.p.nan_to_num(), lambda: model.taken[:, None], seen))


class Within(nn.Module):
    """Its own argument names the padding of a part of what it attends to."""

    def __init__(self, join) -> None:
        super().__init__()
        self.inner, self.join = Attends(lambda m, q, k, mask: filled(scores(q, k), ~mask).softmax(-1)), join
        self.one = nn.Parameter(torch.randn(1, 2, 16))

    def forward(self, x, attention_mask):
        taken = self.join(attention_mask[..., None].float(), torch.ones(1, 2, 1))[..., 0] != 0
        self.seen = taken[:, None, None] & torch.ones(2 * [taken.size(1)], dtype=torch.bool).tril()
        return self.inner(self.join(x, self.one), self.seen)


def test_an_argument_names_padding_among_tokens_that_others_were_put_before():
    model = Within(JOINED["learned tokens before"])
    taken = torch.cat((torch.ones(3, 2, dtype=torch.bool), TAKEN), 1)[:, None]
    assert_recorded(model, TAKEN.long(), inner=(lambda: model.inner.p, lambda: taken, lambda: model.seen))


def test_it_names_none_among_tokens_that_were_moved_by_one():
    """They may be a decoder's, whose own mask was not given."""
    model = Within(JOINED["moved by a constant"])
    taken = torch.ones(3, 1, LENGTH, dtype=torch.bool)
    assert_recorded(model, TAKEN.long(), inner=(lambda: model.inner.p, lambda: taken, lambda: model.seen))


FLOATS = {
    "zeros and ones": TAKEN.float(),
    "added": torch.zeros(TAKEN.shape).masked_fill(~TAKEN, torch.finfo(torch.float32).min),
}


@pytest.mark.parametrize("how", FLOATS)
def test_an_argument_of_floats_names_padding(how):
    """PEFT's prompt tuning joins ones to the mask, which makes it one of floats."""
    model = Within(lambda x, one: x if x.size(2) > 1 else TAKEN[..., None])
    assert_recorded(model, FLOATS[how], inner=(lambda: model.inner.p, TAKEN[:, None], lambda: model.seen))
