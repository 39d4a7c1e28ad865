"""Language models and recurrent networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.diagnoses.data import sentences
from tests.diagnoses.recipes import Judge, LanguageModel, healthy, judge_sentences


@healthy
def language_model(watch):
    model = LanguageModel()
    optimizer, session = torch.optim.AdamW(model.parameters(), 5e-3), watch(model)
    for ids in sentences(size=8, length=16, steps=100):
        optimizer.zero_grad()
        F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return session


@healthy
def language_model_with_tied_weights_and_warm_up(watch):
    model = LanguageModel(tie=True, dropout=0.1)
    optimizer, session = torch.optim.AdamW(model.parameters(), 5e-3), watch(model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=101)
    for ids in sentences(size=8, length=16, steps=100):
        logits = model(ids[:, :-1])
        optimizer.zero_grad()
        F.cross_entropy(logits.transpose(1, 2), ids[:, 1:]).backward()
        optimizer.step()
        scheduler.step()
    return session


@healthy
def masked_tokens(watch):
    model = LanguageModel()
    model.forward = lambda ids: model.head(model.blocks(model.embed(ids) + model.place(torch.arange(ids.shape[1]))))
    optimizer, session = torch.optim.AdamW(model.parameters(), 3e-3), watch(model)
    for ids in sentences(size=8, length=16, steps=80):
        hidden = torch.rand(ids.shape) < 0.2
        logits = model(ids.masked_fill(hidden, 63))
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), ids.masked_fill(~hidden, -100).flatten()).backward()
        optimizer.step()
    return session


@healthy
def sentences_of_any_length_with_a_padding_mask(watch):
    return judge_sentences(watch, Judge(masked=True))


class _Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(64, 32), kind(32, 48, batch_first=True), nn.Linear(48, 64)

    def forward(self, ids):
        return self.head(self.rnn(self.embed(ids))[0])


@healthy
def recurrent_network(watch):
    model = _Recurrent()
    optimizer, session = torch.optim.Adam(model.parameters(), 1e-2), watch(model)
    for ids in sentences(size=8, length=16, steps=80):
        optimizer.zero_grad()
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return session


@healthy
def recurrent_with_a_state_that_is_detached(watch):
    model = nn.ModuleDict({"rnn": nn.GRU(8, 16, batch_first=True), "head": nn.Linear(16, 1)})
    optimizer, session = torch.optim.Adam(model.parameters(), 3e-3), watch(model)
    x = torch.randn(16, 400, 8)
    y, state = x[..., :1].cumsum(1) / 10, None
    for i in range(0, 400, 5):
        out, state = model["rnn"](x[:, i : i + 5], state)
        state = state.detach()
        optimizer.zero_grad()
        F.mse_loss(model["head"](out), y[:, i : i + 5]).backward()
        optimizer.step()
    return session
