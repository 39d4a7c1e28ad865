"""Padding that attention sees, rows of embeddings that nobody looks up, batches that repeat: and what only looks so."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchprobe
from tests.diagnoses.data import batches, digits, sentences
from tests.diagnoses.recipes import Judge, LanguageModel, adam, judge_sentences, mlp, padded
from tests.modes import NoHostRead
from torchprobe.records import Record
from torchprobe.rules.diagnoses.losses import AttendsToPadding, _least
from torchprobe.testing import MemoryWriter

RULES = ["attends_to_padding", "unused_embedding_rows", "repeated_batch"]


def said(recipe, every=1):
    torch.manual_seed(0)
    watch = partial(torchprobe.instrument, writer=MemoryWriter(), every=every, rules=RULES)
    session = recipe(partial(watch, probes=[torchprobe.Diagnosis(), torchprobe.Attention()]))
    session.detach()
    return [*session.alerts, *session.remarks]


def names(recipe, every=1):
    return {one.rule for one in said(recipe, every)}


# ---- padding


def begins_with_padding(ids):
    return padded(ids).flip(1)


@pytest.mark.parametrize("cut", [padded, begins_with_padding])
def test_padding_that_attention_sees_is_named_with_a_bound_of_what_it_gets(cut):
    model = Judge(masked=False)
    shares = []
    model.embed.register_forward_hook(lambda module, args, output: shares.append((args[0] == 0).float().mean().item()))
    (alert,) = said(lambda watch: judge_sentences(watch, model, 4, cut))
    assert alert.rule == "attends_to_padding"
    assert 0.01 < alert.value < shares[alert.step - 1]  # attention is nearly uniform at first


@pytest.mark.parametrize("sharpness", [0.3, 3.0, 30.0])
def test_no_more_is_claimed_than_lies_on_padding(sharpness):
    """Of made-up attention, each row of another length."""
    rows, tokens = 64, 20
    hidden = torch.arange(tokens) >= torch.randint(4, tokens, (rows, 1))
    logits = sharpness * torch.randn(rows, tokens, tokens, dtype=torch.float64)
    p = logits.softmax(-1)
    entropy = -torch.special.xlogy(p, p).sum(-1).mean().item()
    real, shares = ~hidden, hidden.double().mean(1)
    evidence = {
        "padding": shares.mean().item(), "padding_tokens": float(tokens),
        "padding_met": (real.sum(1) * shares).sum().item() / real.sum().item(),
    }  # fmt: skip
    values = {"attention_entropy/a": entropy, "attention_entropy_normalized/a": entropy / math.log(tokens)}
    on_padding = (p * hidden[:, None]).sum(-1)
    rule = AttendsToPadding(samples=1)
    for alert in rule.watcher()(Record(1, 0.0, values, evidence=evidence)):
        assert alert.value <= min(on_padding.mean(), on_padding[real].mean())
    assert _least(0.0 + evidence["padding"], 0.0) == pytest.approx(evidence["padding"])


class Causal(LanguageModel):
    def __init__(self):
        super().__init__(classes=65)
        self.embed = nn.Embedding(65, 32, padding_idx=0)


def causal_model_with_padding_on_the_right(watch):
    model = Causal()
    optimizer, session = adam(model), watch(model)
    for ids in map(padded, sentences(steps=5)):
        optimizer.zero_grad()
        F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0).backward()
        optimizer.step()
    return session


class TwoTowers(nn.Module):
    """As many patches as tokens; of the text, padding is masked or read by an LSTM."""

    def __init__(self, text):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
        self.text, self.patch, self.image = text, nn.Linear(4, 32), nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(32, 2)

    def forward(self, ids):
        patches = torch.randn(len(ids), ids.shape[1], 4)
        return self.text(ids) + self.head(self.image(self.patch(patches)).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.rnn = nn.Embedding(65, 32, padding_idx=0), nn.LSTM(32, 2, batch_first=True)

    def forward(self, ids):
        return self.rnn(self.embed(ids))[0].mean(1)


def repeats_its_last_character(ids):
    return torch.where(torch.arange(ids.shape[1]) < 18, ids + 1, ids[:, :1] + 1)


def codes_of_images(ids):
    """Background in long runs, also between other codes."""
    return torch.where((ids % 3 == 0) | (torch.arange(ids.shape[1]) > 18), 0, ids + 1)


HEALTHY = {
    "masked": lambda watch: judge_sentences(watch, Judge(masked=True), 5),
    "causal": causal_model_with_padding_on_the_right,
    "repeats": lambda watch: judge_sentences(watch, Judge(masked=False), 5, repeats_its_last_character),
    "codes": lambda watch: judge_sentences(watch, Judge(masked=False), 5, codes_of_images),
    "not said to be padding": lambda watch: judge_sentences(watch, Judge(masked=False, padding=None), 5),
    "packed": lambda watch: judge_sentences(watch, Judge(masked=False), 5, lambda ids: ids + 1),
    "image beside text": lambda watch: judge_sentences(watch, TwoTowers(Judge(masked=True)), 5),
    "image beside recurrent text": lambda watch: judge_sentences(watch, TwoTowers(Recurrent()), 5),
}


@pytest.mark.parametrize("recipe", HEALTHY.values(), ids=HEALTHY)
def test_padding_that_is_hidden_or_none_is_not_named(recipe):
    assert names(recipe) == set()


# ---- rows


def look_up(watch, table, ids_of, steps=12, out=None):
    model = nn.Sequential(table, nn.Flatten(), nn.Linear(8 * table.embedding_dim, 4)) if out is None else out
    optimizer, session = adam(model), watch(model)
    for step in range(steps):
        optimizer.zero_grad()
        model(ids_of(step)).square().mean().backward()
        optimizer.step()
    return session


def some_of(rows, size=64):
    return lambda step: torch.randint(rows, (size, 8))


def test_a_table_larger_than_its_vocabulary_is_a_remark():
    (remark,) = said(lambda watch: look_up(watch, nn.Embedding(100, 4), some_of(30)))
    assert (remark.rule, remark.where, remark.value) == ("unused_embedding_rows", "0", 70.0)
    assert remark.step == 4  # of 512 look-ups each: 20 for a row, and none is new since step 2


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 4)

    def forward(self, ids):
        return F.linear(self.embed(ids), self.embed.weight)


def of_a_growing_part(step):
    return torch.randint(2 + 2 * step, (64, 8))


def positions(step):
    return torch.arange(8).expand(64, 8)


def distances(step):
    return (50 + (torch.arange(8)[:, None] - torch.arange(8)).clamp(-4, 4)).repeat(64, 1)


def frozen(table):
    table.weight.requires_grad_(False)
    return table


class Positions(nn.Embedding):
    """What it is called with are no rows of it, as of BART's and Whisper's tables of positions."""

    def forward(self, ids):
        return super().forward(torch.arange(ids.shape[1]).expand(ids.shape))


ROWS = {
    "all are used": lambda watch: look_up(watch, nn.Embedding(100, 4), some_of(100)),
    "all but padding": lambda watch: look_up(watch, nn.Embedding(20, 4, padding_idx=19), some_of(19)),
    "a short run of many": lambda watch: look_up(watch, nn.Embedding(10_000, 4), some_of(30)),
    "new ones come": lambda watch: look_up(watch, nn.Embedding(100, 4), of_a_growing_part),
    "tied": lambda watch: look_up(watch, None, some_of(30), out=Tied()),
    "positions": lambda watch: look_up(watch, nn.Embedding(100, 4), positions),
    "positions, called with tokens": lambda watch: look_up(watch, Positions(100, 4), some_of(30)),
    "distances": lambda watch: look_up(watch, nn.Embedding(100, 4), distances),
    "one kind of segment": lambda watch: look_up(watch, nn.Embedding(2, 4), some_of(1)),
    "frozen": lambda watch: look_up(watch, frozen(nn.Embedding(100, 4)), some_of(30)),
}


@pytest.mark.parametrize("recipe", ROWS.values(), ids=ROWS)
def test_rows_that_are_used_or_not_yet_known_are_not_named(recipe):
    assert "unused_embedding_rows" not in names(recipe)


def test_a_table_that_is_called_with_other_numbers_than_its_rows_switches_nothing_off(caplog):
    said(lambda watch: look_up(watch, Positions(8, 4), some_of(30), steps=1))
    assert "failed" not in caplog.text


def test_gradients_of_a_sparse_table_are_looked_at_no_closer():
    def recipe(watch):
        table = nn.Embedding(100, 4, sparse=True)
        model = nn.Sequential(table, nn.Flatten(), nn.Linear(32, 4))
        optimizer, session = torch.optim.SGD(model.parameters(), 0.1), watch(model)
        for step in range(12):
            optimizer.zero_grad()
            model(some_of(30)(step)).square().mean().backward()
            optimizer.step()
        return session

    assert [remark.value for remark in said(recipe)] == [70.0]


# ---- batches


def train(watch, give, steps=23):
    model = mlp()
    optimizer, session = adam(model), watch(model)
    for step in range(steps):
        x, y = give(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return session


def of_a_loader(number):
    x, y = (part[: 16 * number].view(number, 16, -1) for part in digits())
    return lambda step: (x[step % number], y[step % number, :, 0])


@pytest.mark.parametrize("every", [None, 1, 10])
def test_the_first_batch_over_and_over_is_a_remark(every):
    remark = said(lambda watch: train(watch, of_a_loader(1)), every)
    assert [one.rule for one in remark] == ["repeated_batch"]


@pytest.mark.parametrize(("number", "every"), [(2, 1), (9, 10), (3, lambda step: step % 3 == 0)])
def test_a_few_batches_in_a_fixed_order_are_not(number, every):
    assert names(lambda watch: train(watch, of_a_loader(number), 31), every) == set()


class OnAGrid(nn.Linear):
    def forward(self, points, time):
        return super().forward(torch.cat((points, time[:, None]), 1))


def test_inputs_of_which_one_changes_are_not():
    def recipe(watch):
        model, points = OnAGrid(3, 1), torch.rand(32, 2)
        optimizer, session = adam(model), watch(model)
        for _ in range(4):
            optimizer.zero_grad()
            model(points, torch.rand(32)).square().mean().backward()
            optimizer.step()
        return session

    assert names(recipe) == set()


def test_a_full_batch_that_is_shuffled_is_not():
    x, y = digits()
    assert names(lambda watch: train(watch, lambda step: next(batches(x, y, size=len(x))))) == set()


def test_the_host_waits_for_none_of_it():
    model, ids = Judge(masked=False), padded(next(sentences(steps=1)))
    table = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1), nn.Flatten(0))
    whole = nn.ModuleDict({"judge": model, "table": table})
    optimizer = torch.optim.SGD(whole.parameters(), 0.1)
    probes = [torchprobe.Diagnosis()]
    with torchprobe.instrument(whole, writer=MemoryWriter(), every=1, probes=probes) as session, NoHostRead():
        for _ in range(2):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(ids), torch.ones(len(ids), dtype=torch.long))
            (loss + F.binary_cross_entropy_with_logits(table(torch.randn(32, 8)), torch.ones(32))).backward()
            optimizer.step()
    assert session.step == 2
