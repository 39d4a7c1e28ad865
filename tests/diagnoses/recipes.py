"""What recipes are made of, and the galleries in which they stand under their names."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.diagnoses.data import batches, digits, sentences

HEALTHY, SICK, REMARKS = {}, {}, {}


def healthy(recipe):
    """Into the gallery."""
    HEALTHY[recipe.__name__] = recipe
    return recipe


def sick(rule, among=SICK):
    """Into the table, under the rule that is to name it."""

    def take(recipe):
        among[recipe.__name__] = rule, recipe
        return recipe

    return take


def adam(model, rate=3e-3):
    return torch.optim.Adam(model.parameters(), rate)


def mlp(inputs=64, outputs=10, act=nn.ReLU, width=48):
    return nn.Sequential(nn.Linear(inputs, width), act(), nn.Linear(width, width), act(), nn.Linear(width, outputs))


def cnn(classes=10):
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, classes),
    )  # fmt: skip


class LanguageModel(nn.Module):
    def __init__(self, width=32, layers=2, heads=4, classes=64, tie=False, dropout=0.0):
        super().__init__()
        self.embed = nn.Embedding(classes, width)
        self.place = nn.Embedding(64, width)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes, bias=False)
        if tie:
            self.head.weight = self.embed.weight
            nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, ids):
        n = ids.shape[1]
        x = self.embed(ids) + self.place(torch.arange(n))
        mask = torch.full((n, n), -math.inf).triu(1)
        return self.head(self.blocks(x, mask=mask))


def classify(watch, model, optimizer, steps=100, data=None, loss=F.cross_entropy, after=None, size=32):
    session = watch(model)
    for x, y in batches(*(data or digits()), size=size, steps=steps):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        if after:
            after()
    return session


class Seeing(LanguageModel):
    """Without a mask: each token sees those that follow."""

    def forward(self, ids):
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1]))
        return self.head(self.blocks(x))


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.a, self.b = nn.Sequential(nn.Linear(64, 32), nn.ReLU()), nn.Linear(32, 10), nn.Linear(32, 2)

    def forward(self, x):
        h = self.body(x)
        return {"digit": self.a(h), "odd": self.b(h)}


class Judge(nn.Module):
    """Says of text, padded with 0 at its end, whether it has an "e" in it."""

    def __init__(self, masked, padding=0):
        super().__init__()
        self.masked, self.embed = masked, nn.Embedding(65, 32, padding_idx=padding)
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=True)
        self.blocks, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(32, 2)

    def forward(self, ids):
        h = self.blocks(self.embed(ids), src_key_padding_mask=ids == 0 if self.masked else None)
        return self.head((h * (ids > 0)[..., None]).sum(1) / (ids > 0).sum(1, keepdim=True))


def padded(ids, least=6):
    """Windows of text cut to any length, and 0 behind it."""
    return (ids + 1) * (torch.arange(ids.shape[1]) < torch.randint(least, ids.shape[1] + 1, (len(ids), 1)))


def judge_sentences(watch, model, steps=30, cut=padded):
    optimizer, session = adam(model, 1e-3), watch(model)
    for ids in map(cut, sentences(steps=steps, size=16)):
        optimizer.zero_grad()
        F.cross_entropy(model(ids), (ids == 39).any(1).long()).backward()
        optimizer.step()
    return session
