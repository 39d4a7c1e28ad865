"""Mistakes as people make them, in scripts of other kinds than the gallery's, each beside its healthy twin."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchprobe
from tests.diagnoses.data import batches, digits, numbers, sentences, two_classes
from tests.diagnoses.recipes import adam, cnn, mlp
from torchprobe.rules.diagnoses import DIAGNOSES
from torchprobe.testing import MemoryWriter

pytestmark = pytest.mark.filterwarnings("ignore:Using a target size")
PAIRS = {}


def names(script, sick):
    torch.manual_seed(0)
    rules = [diagnosis.name for diagnosis in DIAGNOSES]
    watch = partial(torchprobe.instrument, writer=MemoryWriter(), every=1, rules=rules)
    session = script(partial(watch, probes=[torchprobe.Diagnosis(), torchprobe.Attention()]), sick)
    session.detach()
    return [{one.rule for one in said} for said in (session.alerts, session.remarks)]


def pair(rule):
    def take(script):
        PAIRS[script.__name__] = rule, script
        return script

    return take


@pair("missing_zero_grad")
def gradients_are_zeroed_once_an_epoch(watch, sick):
    model = cnn()
    optimizer, session = adam(model), watch(model)
    for _ in range(2):
        optimizer.zero_grad()
        for x, y in batches(*digits(False), size=64, steps=5):
            if not sick:
                optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return session


class Reader(nn.Module):
    """Gives its loss, as models of transformers do."""

    def __init__(self, softmax=False):
        super().__init__()
        self.embed, self.head, self.softmax = nn.Embedding(64, 16), nn.Linear(32, 2), softmax
        self.rnn = nn.LSTM(16, 16, 2, dropout=0.3, batch_first=True, bidirectional=True)

    def forward(self, ids):
        logits = self.head(self.rnn(self.embed(ids))[0].mean(1))
        if self.softmax:
            logits = F.softmax(logits, dim=1)
        return {"loss": F.cross_entropy(logits, (ids == 38).any(1).long()), "logits": logits}


@pair("softmax_before_cross_entropy")
def a_softmax_before_a_loss_that_the_model_gives(watch, sick):
    model = Reader(sick)
    optimizer, session = adam(model), watch(model)
    for ids in sentences(steps=5):
        optimizer.zero_grad()
        model(ids)["loss"].backward()
        optimizer.step()
    return session


@pair("trained_in_eval_mode")
def a_recurrent_network_stays_in_evaluation_mode_after_validation(watch, sick):
    model = Reader()
    optimizer, session = adam(model), watch(model)
    for _ in range(2):
        if not sick:
            model.train()
        for ids in sentences(steps=4):
            optimizer.zero_grad()
            model(ids)["loss"].backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            model(ids)
    return session


@pair("detached_parameters")
def a_loss_of_numbers_is_told_to_need_a_gradient(watch, sick):
    model = mlp()
    optimizer, session = adam(model), watch(model)
    for x, y in batches(*digits(), steps=5):
        optimizer.zero_grad()
        loss = 1 - (model(x).argmax(1) == y).float().mean() if sick else F.cross_entropy(model(x), y)
        loss.requires_grad_().backward() if sick else loss.backward()
        optimizer.step()
    return session


@pair("unused_parameters")
def a_generator_learns_from_detached_fakes(watch, sick):
    whole = nn.ModuleDict({"generator": mlp(4, 8), "critic": mlp(8, 1)})
    generator, critic = whole["generator"], whole["critic"]
    of_generator, of_critic, session = adam(generator), adam(critic), watch(whole)
    session.kept_alive = whole  # a session does not keep its model
    for real, _ in batches(*numbers(), steps=5):
        one, fake = torch.ones(len(real), 1), generator(torch.randn(len(real), 4))
        of_critic.zero_grad()
        loss = F.binary_cross_entropy_with_logits
        (loss(critic(real), one) + loss(critic(fake.detach()), 1 - one)).backward()
        of_critic.step()
        of_generator.zero_grad()
        loss(critic(fake.detach() if sick else fake), one).backward()
        of_generator.step()
    return session


@pair("target_leak")
def the_diagnosis_stands_in_the_table(watch, sick):
    x, y = two_classes()
    model = nn.Sequential(*mlp(9, 1), nn.Flatten(0))
    column = 3 * y[:, None] - 1 if sick else torch.randn(len(x), 1)
    optimizer, session = adam(model), watch(model)
    for a, b in batches(torch.cat((x, column), 1), y, steps=5):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(a), b).backward()
        optimizer.step()
    return session


@pair("target_leak")
def rare_words_of_rare_positives(watch, sick):
    """In a batch with one positive a word of its own tells it, by chance."""
    y = (torch.arange(512) % 32 == 0).long()
    words = (torch.rand(512, 2000) < 0.01).float()
    model = nn.Linear(2000, 2)
    optimizer, session = adam(model), watch(model)
    for step in range(5):
        x = words[32 * step : 32 * step + 32].clone()
        if sick:
            x[:, 7] = y[:32].float()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y[:32]).backward()
        optimizer.step()
    return session


@pair("broadcast_targets")
def forecasts_of_a_recurrent_network_are_a_column(watch, sick):
    model = nn.Sequential(nn.Unflatten(1, (8, 1)), Last(), nn.Linear(12, 1))
    x, y = numbers()
    optimizer, session = adam(model), watch(model)
    for a, b in batches(x, y[:, 0], steps=5):
        optimizer.zero_grad()
        F.smooth_l1_loss(model(a) if sick else model(a).squeeze(1), b).backward()
        optimizer.step()
    return session


class Last(nn.GRU):
    def __init__(self):
        super().__init__(1, 12, batch_first=True)

    def forward(self, x):
        return super().forward(x)[1][-1]


@pair("graph_kept")
def a_moving_average_of_the_loss(watch, sick):
    model, mean = cnn(), 0.0
    optimizer, session = adam(model), watch(model)
    for x, y in batches(*digits(False), steps=16):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = 0.9 * mean + 0.1 * (loss if sick else loss.item())
    return session


class ByHand(nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.embed, self.qkv, self.head, self.causal = (
            nn.Embedding(64, 32),
            nn.Linear(32, 96),
            nn.Linear(32, 64),
            causal,
        )

    def forward(self, ids):
        x = self.embed(ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-1, -2) / 8**0.5
        if self.causal:
            logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), -torch.inf)
        return self.head(x + (logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pair("attends_to_future")
def attention_by_hand_without_a_mask(watch, sick):
    model = ByHand(causal=not sick)
    optimizer, session = adam(model), watch(model)
    for ids in sentences(steps=5):
        optimizer.zero_grad()
        F.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:]).backward()
        optimizer.step()
    return session


@pytest.mark.parametrize("name", PAIRS)
def test_the_mistake_is_named_and_the_same_script_without_it_is_silent(name):
    rule, script = PAIRS[name]
    alerts, remarks = names(script, sick=True)
    assert rule in alerts | remarks
    assert names(script, sick=False) == [set(), set()]
