"""Every kind of loss, for labels, numbers, pairs and pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.diagnoses.data import batches, digits, numbers, two_classes
from tests.diagnoses.recipes import classify, healthy, mlp


@healthy
def label_smoothing_and_class_weights(watch):
    model = mlp()
    loss = nn.CrossEntropyLoss(weight=torch.linspace(0.5, 2, 10), label_smoothing=0.1)
    return classify(watch, model, torch.optim.Adam(model.parameters(), 3e-3), loss=loss)


@healthy
def log_softmax_and_nll(watch):
    model = nn.Sequential(*mlp(), nn.LogSoftmax(-1))
    return classify(watch, model, torch.optim.Adam(model.parameters(), 3e-3), loss=F.nll_loss)


@healthy
def log_softmax_and_cross_entropy_does_no_harm(watch):
    model = nn.Sequential(*mlp(), nn.LogSoftmax(-1))
    return classify(watch, model, torch.optim.Adam(model.parameters(), 3e-3))


@healthy
def softmax_and_log_by_hand(watch):
    model = nn.Sequential(*mlp(), nn.Softmax(-1))
    loss = lambda p, y: F.nll_loss((p + 1e-8).log(), y)  # noqa: E731
    return classify(watch, model, torch.optim.Adam(model.parameters(), 3e-3), loss=loss)


@healthy
def binary_with_logits(watch):
    model = nn.Sequential(*mlp(8, 1), nn.Flatten(0))
    loss = F.binary_cross_entropy_with_logits
    return classify(watch, model, torch.optim.Adam(model.parameters(), 3e-3), data=two_classes(), loss=loss)


@healthy
def sigmoid_and_bce(watch):
    model = nn.Sequential(*mlp(8, 1), nn.Sigmoid(), nn.Flatten(0))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    return classify(watch, model, optimizer, data=two_classes(), loss=F.binary_cross_entropy)


@healthy
def multi_label(watch):
    x, y = digits()
    model = mlp(outputs=4)
    labels = torch.stack([(y % k == 0).float() for k in (2, 3, 4, 5)], 1)
    loss = F.binary_cross_entropy_with_logits
    return classify(watch, model, torch.optim.Adam(model.parameters(), 3e-3), data=(x, labels), loss=loss)


@healthy
def regression(watch):
    model = mlp(8, 1)
    return classify(watch, model, torch.optim.Adam(model.parameters(), 3e-3), data=numbers(), loss=F.mse_loss)


@healthy
def regression_squeezed_by_hand(watch):
    model, (x, y) = mlp(8, 1), numbers()
    loss = lambda out, y: (out.squeeze(-1) - y).pow(2).mean()  # noqa: E731
    return classify(watch, model, torch.optim.SGD(model.parameters(), 0.02), data=(x, y[:, 0]), loss=loss)


@healthy
def counts_with_a_relu_at_the_end(watch):
    model, (x, y) = nn.Sequential(*mlp(8, 1), nn.ReLU()), numbers()
    model[-2].bias.data.fill_(1.0)
    return classify(watch, model, torch.optim.Adam(model.parameters(), 3e-3), data=(x, y.relu()), loss=F.huber_loss)


@healthy
def gaussian_likelihood(watch):
    model = mlp(8, 2)
    loss = lambda out, y: F.gaussian_nll_loss(out[:, :1], y, out[:, 1:].exp())  # noqa: E731
    return classify(watch, model, torch.optim.Adam(model.parameters(), 3e-3), data=numbers(), loss=loss)


class _Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp(64, 16)

    def forward(self, x):
        first, second = (F.normalize(self.body(x + 0.3 * torch.randn_like(x)), dim=1) for _ in range(2))
        return 5 * first @ second.T


@healthy
def pairs_that_are_found_both_ways(watch):
    model, (x, _) = _Pairs(), digits()
    optimizer, session = torch.optim.Adam(model.parameters(), 1e-3), watch(model)
    for batch, _ in batches(x, x, steps=100):
        logits, own = model(batch), torch.arange(len(batch))
        optimizer.zero_grad()
        (F.nll_loss(logits.log_softmax(1), own) + F.nll_loss(logits.log_softmax(0), own)).backward()
        optimizer.step()
    return session


@healthy
def ranking_of_all_pairs(watch):
    model, (x, y) = mlp(8, 1), numbers()

    def loss(score, y):
        return F.softplus(-(score - score.T) * (y - y.T).sign()).mean()

    return classify(watch, model, torch.optim.Adam(model.parameters(), 1e-3), data=(x, y), loss=loss)


@healthy
def proportional_hazards(watch):
    model, (x, y) = mlp(8, 1), numbers()

    def loss(risk, time):
        at_risk = (time[:, None] <= time[None, :]).float()
        return -(risk[:, 0] - (at_risk * risk[:, 0].exp()).sum(1).log()).mean()

    return classify(watch, model, torch.optim.Adam(model.parameters(), 1e-3), data=(x, y[:, 0]), loss=loss)


@healthy
def autoencoder(watch):
    model, (x, _) = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 64)), digits()
    return classify(watch, model, torch.optim.Adam(model.parameters(), 5e-3), data=(x, x), loss=F.mse_loss)


class _Variational(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.mean, self.log_var = nn.Linear(64, 32), nn.Linear(32, 4), nn.Linear(32, 4)
        self.decode = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 64), nn.Sigmoid())

    def forward(self, x):
        h = self.inner(x).relu()
        mean, log_var = self.mean(h), self.log_var(h)
        return self.decode(mean + torch.randn_like(mean) * (log_var / 2).exp()), mean, log_var


@healthy
def variational_autoencoder(watch):
    model, (x, y) = _Variational(), digits()
    optimizer, session = torch.optim.Adam(model.parameters(), 3e-3), watch(model)
    for a, _ in batches((x - x.min()) / (x.max() - x.min()), y, steps=80):
        out, mean, log_var = model(a)
        loss = F.binary_cross_entropy(out, a, reduction="sum") / len(a)
        loss = loss - 0.5 * (1 + log_var - mean**2 - log_var.exp()).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return session


@healthy
def triplets(watch):
    model, (x, y) = mlp(64, 8), digits()
    optimizer, session = torch.optim.Adam(model.parameters(), 1e-3), watch(model)
    groups = [x[y == k] for k in range(10)]
    for i in range(80):
        same, other = groups[i % 10], groups[(i + 3) % 10]
        pick = lambda g: F.normalize(model(g[torch.randint(0, len(g), (16,))]), dim=1)  # noqa: E731
        optimizer.zero_grad()
        F.triplet_margin_loss(pick(same), pick(same), pick(other), margin=0.3).backward()
        optimizer.step()
    return session


@healthy
def contrastive(watch):
    model, (x, y) = mlp(64, 8), digits()
    optimizer, session = torch.optim.Adam(model.parameters(), 1e-3), watch(model)
    for a, _ in batches(x, y, steps=100):
        one, two = (F.normalize(model(a + 0.2 * torch.randn_like(a)), dim=1) for _ in range(2))
        optimizer.zero_grad()
        F.cross_entropy(one @ two.T / 0.2, torch.arange(len(a))).backward()
        optimizer.step()
    return session


@healthy
def hard_to_learn_with_two_classes_in_a_hundred(watch):
    x, y = digits()
    rare = (y == 3).long()
    model = mlp(outputs=2)
    return classify(watch, model, torch.optim.Adam(model.parameters(), 3e-3), data=(x, rare), steps=200)


@healthy
def label_noise(watch):
    x, y = digits()
    y = torch.where(torch.rand(len(y)) < 0.3, torch.randint(0, 10, y.shape), y)
    model = mlp()
    return classify(watch, model, torch.optim.Adam(model.parameters(), 2e-3), data=(x, y), steps=200)


@healthy
def losses_kept_as_numbers(watch):
    model, kept = mlp(), []
    optimizer, session = torch.optim.Adam(model.parameters(), 3e-3), watch(model)
    for x, y in batches(*digits(), steps=80):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        kept.append(loss.item())
    return session


@healthy
def margin_softmax_with_scaled_cosines(watch):
    class Margin(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.centres = mlp(64, 16), nn.Parameter(torch.randn(10, 16))

        def forward(self, x):
            return 30.0 * F.linear(F.normalize(self.body(x)), F.normalize(self.centres))

    model = Margin()
    return classify(watch, model, torch.optim.Adam(model.parameters(), 3e-3))
