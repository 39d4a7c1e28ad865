"""Parts that are frozen, detached, not used, or hidden from the model."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from tests.diagnoses.data import batches, digits
from tests.diagnoses.recipes import TwoHeads, classify, healthy, mlp


@healthy
def frozen_backbone(watch):
    model = mlp()
    for layer in model[:3]:
        layer.requires_grad_(False)
    return classify(watch, model, torch.optim.Adam(model[3:].parameters(), 1e-2))


@healthy
def frozen_backbone_that_the_optimizer_holds_too(watch):
    model = mlp()
    model[0].requires_grad_(False)
    return classify(watch, model, torch.optim.AdamW(model.parameters(), 3e-3))


class _LowRank(nn.Module):
    def __init__(self, layer, rank=4):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, layer.in_features) / 8)
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x):
        return self.layer(x) + x @ self.a.T @ self.b.T


@healthy
def low_rank_adapters(watch):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for x, y in batches(*digits(), steps=40):  # what is adapted
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    adapted = nn.Sequential(*[_LowRank(m) if isinstance(m, nn.Linear) else m for m in model])
    adapted.zero_grad()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    return classify(watch, adapted, torch.optim.AdamW(trained, 1e-2))


@healthy
def a_head_that_is_not_used(watch):
    model = TwoHeads()
    loss = lambda out, y: F.cross_entropy(out["digit"], y)  # noqa: E731
    return classify(watch, model, torch.optim.Adam(model.parameters(), 3e-3), loss=loss)


@healthy
def two_heads(watch):
    model = TwoHeads()
    loss = lambda out, y: F.cross_entropy(out["digit"], y) + F.cross_entropy(out["odd"], y % 2)  # noqa: E731
    return classify(watch, model, torch.optim.Adam(model.parameters(), 3e-3), loss=loss)


@healthy
def a_teacher_hidden_in_a_list(watch):
    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()
            self.hidden = [copy.deepcopy(self.net).requires_grad_(False)]

        def forward(self, x):
            return self.net(x), self.hidden[0](x)

    model = Student()
    loss = lambda out, y: F.cross_entropy(out[0], y) + 0.01 * F.mse_loss(*out)  # noqa: E731
    return classify(watch, model, torch.optim.Adam(model.parameters(), 3e-3), loss=loss)


@healthy
def a_list_whose_layers_the_optimizer_holds(watch):
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.Linear(64, 64) for _ in range(2)]
            self.head = nn.Linear(64, 10)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x).relu()
            return self.head(x)

    model = Listed()
    held = [*model.parameters(), *(p for layer in model.layers for p in layer.parameters())]
    return classify(watch, model, torch.optim.Adam(held, 3e-3))


@healthy
def a_branch_that_is_computed_first_and_not_used(watch):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.other, self.body, self.head = nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(32, 10)

        def forward(self, x):
            other = self.other(x)
            return self.head(self.body(x).relu()), other

    model = Branches()
    loss = lambda out, y: F.cross_entropy(out[0], y)  # noqa: E731
    return classify(watch, model, torch.optim.Adam(model.parameters(), 3e-3), loss=loss)


@healthy
def a_probe_on_detached_features(watch):
    class Probed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.back, self.probe = nn.Linear(64, 16), nn.Linear(16, 64), nn.Linear(16, 10)

        def forward(self, x):
            h = self.body(x).tanh()
            return self.back(h), self.probe(h.detach())

    model = Probed()
    optimizer, session = torch.optim.Adam(model.parameters(), 3e-3), watch(model)
    for x, y in batches(*digits(), steps=80):
        back, guess = model(x)
        optimizer.zero_grad()
        (F.mse_loss(back, x) + F.cross_entropy(guess, y)).backward()
        optimizer.step()
    return session


@healthy
def quantised_with_a_straight_through_gradient(watch):
    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.decode = nn.Linear(64, 16), nn.Linear(16, 64)

        def forward(self, x):
            h = self.encode(x)
            return self.decode(h + (h.round() - h).detach())

    model, (x, _) = Quantised(), digits()
    return classify(watch, model, torch.optim.Adam(model.parameters(), 3e-3), data=(x, x), loss=F.mse_loss)
