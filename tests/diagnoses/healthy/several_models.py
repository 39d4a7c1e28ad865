"""Adversaries, teachers, and what learns from its own outputs."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from tests.diagnoses.data import batches, digits, numbers
from tests.diagnoses.recipes import cnn, healthy, mlp


def _gan(watch, whole, no_grad=False):
    generator, critic = nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8)), mlp(8, 1)
    of_g = torch.optim.Adam(generator.parameters(), 1e-3, betas=(0.5, 0.999))
    of_c = torch.optim.Adam(critic.parameters(), 1e-3, betas=(0.5, 0.999))
    session = watch({"whole": nn.ModuleList([generator, critic]), "generator": generator, "critic": critic}[whole])
    loss = F.binary_cross_entropy_with_logits
    for real, _ in batches(*numbers(), steps=80):
        one, zero = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        if no_grad:
            with torch.no_grad():
                fake = generator(torch.randn(len(real), 4))
        else:
            fake = generator(torch.randn(len(real), 4)).detach()
        of_c.zero_grad()
        (loss(critic(real), one) + loss(critic(fake), zero)).backward()
        of_c.step()
        of_g.zero_grad()
        loss(critic(generator(torch.randn(len(real), 4))), one).backward()
        of_g.step()
    return session


@healthy
def gan_as_one_model(watch):
    return _gan(watch, "whole")


@healthy
def gan_generator_alone(watch):
    return _gan(watch, "generator", no_grad=True)


@healthy
def gan_critic_alone(watch):
    return _gan(watch, "critic")


@healthy
def policy_gradient(watch):
    model = mlp(8, 3)
    optimizer, session = torch.optim.Adam(model.parameters(), 3e-3), watch(model)
    for x, _ in batches(*numbers(), steps=80):
        with torch.no_grad():
            actions = torch.distributions.Categorical(logits=model(x)).sample()
        rewards = (actions == (x[:, 0] > 0).long()).float()
        loss = (F.cross_entropy(model(x), actions, reduction="none") * (rewards - rewards.mean())).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return session


class _ActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.pi, self.v = nn.Sequential(nn.Linear(8, 32), nn.Tanh()), nn.Linear(32, 3), nn.Linear(32, 1)

    def forward(self, x):
        h = self.body(x)
        return self.pi(h), self.v(h).squeeze(-1)


@healthy
def actor_critic(watch):
    model = _ActorCritic()
    optimizer, session = torch.optim.Adam(model.parameters(), 3e-3), watch(model)
    for x, _ in batches(*numbers(), steps=80):
        logits, value = model(x)
        policy = torch.distributions.Categorical(logits=logits)
        actions = policy.sample()
        returns = (actions == (x[:, 0] > 0).long()).float()
        gain = returns - value.detach()
        loss = -(policy.log_prob(actions) * gain).mean() + F.mse_loss(value, returns) - 0.01 * policy.entropy().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return session


@healthy
def q_learning_with_a_target_network(watch):
    model = mlp(8, 3)
    target = copy.deepcopy(model)
    optimizer, session = torch.optim.Adam(model.parameters(), 1e-3), watch(model)
    for i, (x, _) in enumerate(batches(*numbers(), steps=90)):
        with torch.no_grad():
            best = (x[:, :3] > 0).float() + 0.5 * target(x).amax(1, keepdim=True)
        optimizer.zero_grad()
        F.smooth_l1_loss(model(x), best).backward()
        optimizer.step()
        if i % 20 == 0:
            target.load_state_dict(model.state_dict())
    return session


@healthy
def distillation(watch):
    teacher, student = mlp(), mlp(width=24)
    optimizer, session = torch.optim.Adam(student.parameters(), 3e-3), watch(student)
    for x, y in batches(*digits(), steps=80):
        with torch.no_grad():
            soft = (teacher(x) / 2).softmax(-1)
        out = student(x)
        loss = F.cross_entropy(out, y) + F.kl_div((out / 2).log_softmax(-1), soft, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return session


@healthy
def momentum_encoder(watch):
    model, (x, y) = mlp(64, 8), digits()
    slow = copy.deepcopy(model).requires_grad_(False)
    predictor = nn.Linear(8, 8)
    whole = nn.ModuleDict({"fast": model, "slow": slow, "predictor": predictor})
    optimizer, session = torch.optim.Adam([*model.parameters(), *predictor.parameters()], 2e-3), watch(whole)
    for a, _ in batches(x, y, steps=80):
        aim = F.normalize(slow(a), dim=1)
        optimizer.zero_grad()
        (2 - 2 * (F.normalize(predictor(model(a)), dim=1) * aim).sum(1)).mean().backward()
        optimizer.step()
        with torch.no_grad():
            for p, q in zip(slow.parameters(), model.parameters(), strict=True):
                p.lerp_(q, 0.05)
    return session


@healthy
def target_network_with_batch_normalisation(watch):
    """It sees two views of each batch, in training mode (Grill et al. 2020)."""
    online = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8))
    target, predictor = copy.deepcopy(online).requires_grad_(False), nn.Linear(8, 8)
    whole = nn.ModuleDict({"online": online, "target": target, "predictor": predictor})
    optimizer, session = torch.optim.Adam([*online.parameters(), *predictor.parameters()], 2e-3), watch(whole)
    for x, _ in batches(*digits(), steps=60):
        one, other = (x + 0.1 * torch.randn_like(x) for _ in range(2))
        with torch.no_grad():
            aims = target(other), target(one)
        pairs = [(predictor(online(view)), aim) for view, aim in zip((one, other), aims, strict=True)]
        optimizer.zero_grad()
        sum(2 - F.cosine_similarity(*pair).mean() for pair in pairs).backward()
        optimizer.step()
        with torch.no_grad():
            for p, q in zip(target.parameters(), online.parameters(), strict=True):
                p.lerp_(q, 0.05)
    return session


@healthy
def pseudo_labels_in_training_mode(watch):
    model, (x, y) = cnn(), digits(False)
    optimizer, session = torch.optim.Adam(model.parameters(), 2e-3), watch(model)
    for a, b in batches(x, y, steps=80):
        with torch.no_grad():
            guess = model(a + 0.1 * torch.randn_like(a)).argmax(1)
        loss = F.cross_entropy(model(a), b) + 0.1 * F.cross_entropy(model(a + 0.3 * torch.randn_like(a)), guess)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return session
