"""Layers of many kinds, and modes and initial values of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.diagnoses.data import batches, digits
from tests.diagnoses.recipes import classify, cnn, healthy, mlp


@healthy
def cnn_batch_norm(watch):
    model = cnn()
    return classify(watch, model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), data=digits(False))


@healthy
def cnn_validates_properly(watch):
    model, (x, y) = cnn(), digits(False)
    optimizer, session = torch.optim.Adam(model.parameters(), 2e-3), watch(model)
    for _ in range(8):
        model.train()
        for a, b in batches(x[:600], y[:600], steps=18):
            optimizer.zero_grad()
            F.cross_entropy(model(a), b).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            for a in x[600:].split(50):
                model(a)
    return session


@healthy
def batch_norm_before_all(watch):
    model = nn.Sequential(nn.BatchNorm1d(64), mlp())
    x, y = digits()
    return classify(watch, model, torch.optim.Adam(model.parameters(), 3e-3), data=(128 + 60 * x, y))


@healthy
def monte_carlo_dropout(watch):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10))
    optimizer, session = torch.optim.Adam(model.parameters(), 3e-3), watch(model)
    x, y = digits()
    for _ in range(6):
        for a, b in batches(x, y, steps=20):
            optimizer.zero_grad()
            F.cross_entropy(model(a), b).backward()
            optimizer.step()
        with torch.no_grad():
            torch.stack([model(x[:50]).softmax(-1) for _ in range(5)]).mean(0)
    return session


@healthy
def fine_tuning_in_evaluation_mode(watch):
    model = cnn()
    model.eval()
    return classify(watch, model, torch.optim.Adam(model.parameters(), 3e-3), data=digits(False))


@healthy
def zero_initialised_head(watch):
    model = mlp()
    nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)
    return classify(watch, model, torch.optim.Adam(model.parameters(), 3e-3))


@healthy
def zero_initialised_head_with_a_warm_up_from_next_to_nothing(watch):
    model = mlp()
    nn.init.zeros_(model[-1].weight)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-6, 1, 60)
    return classify(watch, model, optimizer, steps=120, after=scheduler.step)


class _Gated(nn.Module):
    """Residual branches whose gates begin at zero (Bachlechner et al. 2021)."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(mlp(64, 64, width=32) for _ in range(3))
        self.gates, self.head = nn.Parameter(torch.zeros(3)), nn.Linear(64, 10)

    def forward(self, x):
        for gate, branch in zip(self.gates, self.branches, strict=True):
            x = x + gate * branch(x)
        return self.head(x)


@healthy
def gates_that_begin_at_zero_under_a_warm_up(watch):
    model = _Gated()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-4, 1, 60)
    return classify(watch, model, optimizer, steps=120, after=scheduler.step)


@healthy
def one_layer_called_many_times(watch):
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.layer, self.out = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 10)

        def forward(self, x):
            x = self.into(x).relu()
            for _ in range(3):
                x = x + self.layer(x).relu()
            return self.out(x)

    model = Deep()
    return classify(watch, model, torch.optim.Adam(model.parameters(), 2e-3))


@healthy
def squeeze_and_excite(watch):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 48), nn.Linear(48, 10)
            self.gate = nn.Sequential(nn.Linear(48, 12), nn.ReLU(), nn.Linear(12, 48), nn.Sigmoid())

        def forward(self, x):
            h = self.a(x).relu()
            return self.b(h * self.gate(h))

    model = Gated()
    return classify(watch, model, torch.optim.Adam(model.parameters(), 3e-3))


@healthy
def learned_queries_come_first(watch):
    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.latent = nn.Parameter(torch.randn(4, 16))
            self.q, self.kv, self.head = nn.Linear(16, 16), nn.Linear(8, 32), nn.Linear(64, 10)

        def forward(self, x):
            q = self.q(self.latent.expand(len(x), -1, -1))
            k, v = self.kv(x.view(len(x), 8, 8)).chunk(2, -1)
            return self.head(F.scaled_dot_product_attention(q, k, v).flatten(1))

    model = Queries()
    return classify(watch, model, torch.optim.Adam(model.parameters(), 3e-3))


@healthy
def zero_initialised_residual_branches(watch):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.gate = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
            for layer in (self.b, self.gate):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

        def forward(self, x):
            return x + self.gate(x) + self.b(self.a(x).relu())

    model = nn.Sequential(nn.Linear(64, 32), Block(), Block(), nn.Linear(32, 10))
    nn.init.zeros_(model[-1].weight)
    return classify(watch, model, torch.optim.Adam(model.parameters(), 3e-3))


@healthy
def spectral_and_weight_normalisation(watch):
    norm = torch.nn.utils.parametrizations
    model = nn.Sequential(norm.weight_norm(nn.Linear(64, 32)), nn.ReLU(), norm.spectral_norm(nn.Linear(32, 10)))
    return classify(watch, model, torch.optim.Adam(model.parameters(), 5e-3))


@healthy
def mixture_of_experts(watch):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.route = nn.Linear(64, 4)
            self.experts = nn.ModuleList(nn.Linear(64, 10) for _ in range(4))

        def forward(self, x):
            p = self.route(x).softmax(-1)
            best = p.argmax(-1)
            out = x.new_zeros(len(x), 10)
            for k, expert in enumerate(self.experts):
                if (best == k).any():
                    out = out.index_add(0, (best == k).nonzero()[:, 0], expert(x[best == k]) * p[best == k, k : k + 1])
            return out

    model = Experts()
    return classify(watch, model, torch.optim.Adam(model.parameters(), 3e-3))
