"""Parameters without an optimizer, gradients zeroed wrongly, rates that cannot train."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.diagnoses.data import batches, digits
from tests.diagnoses.recipes import TwoHeads, adam, classify, mlp, sick


@sick("unoptimized_parameters")
def the_body_is_not_given_to_the_optimizer(watch):
    model = mlp()
    return classify(watch, model, torch.optim.Adam(model[4:].parameters(), 3e-3), steps=60)


@sick("unoptimized_parameters")
def the_head_is_replaced_after_the_optimizer_was_made(watch):
    model = mlp()
    optimizer = adam(model)
    model[4] = nn.Linear(48, 10)
    return classify(watch, model, optimizer, steps=60)


@sick("detached_parameters")
def features_are_detached(watch):
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU()), nn.Linear(32, 10)

        def forward(self, x):
            return self.head(self.body(x).detach())

    model = Cut()
    return classify(watch, model, adam(model), steps=60)


@sick("detached_parameters")
def features_pass_through_numpy(watch):
    class Cut(TwoHeads):
        def forward(self, x):
            h = torch.tensor(self.body(x).tolist())
            return self.a(h)

    model = Cut()
    return classify(watch, model, adam(model), steps=60)


@sick("missing_zero_grad")
def gradients_are_never_zeroed(watch):
    model = mlp()
    optimizer, session = torch.optim.SGD(model.parameters(), 0.01), watch(model)
    for x, y in batches(*digits(), steps=60):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return session


@sick("missing_zero_grad")
def gradients_of_micro_batches_are_never_zeroed(watch):
    model = mlp()
    optimizer, session = torch.optim.Adam(model.parameters(), 1e-3), watch(model)
    for i, (x, y) in enumerate(batches(*digits(), steps=120)):
        (F.cross_entropy(model(x), y) / 2).backward()
        if i % 2:
            optimizer.step()
    return session


@sick("zero_grad_before_step")
def gradients_are_zeroed_too_early(watch):
    model = mlp()
    optimizer, session = adam(model), watch(model)
    for x, y in batches(*digits(), steps=60):
        F.cross_entropy(model(x), y).backward()
        optimizer.zero_grad()
        optimizer.step()
    return session


@sick("zero_grad_before_step")
def gradients_are_zeroed_in_place_too_early(watch):
    model = mlp()
    optimizer, session = adam(model), watch(model)
    for x, y in batches(*digits(), steps=60):
        F.cross_entropy(model(x), y).backward()
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
    return session


@sick("zero_grad_before_step")
def a_step_comes_before_backward(watch):
    model = mlp()
    optimizer, session = adam(model), watch(model)
    for x, y in batches(*digits(), steps=60):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        optimizer.step()
        loss.backward()
    return session


@sick("no_optimizer_step")
def the_optimizer_never_steps(watch):
    model = mlp()
    optimizer, session = adam(model), watch(model)
    for x, y in batches(*digits(), steps=110):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
    return session


@sick("learning_rate_too_high")
def a_rate_that_throws_weights_far_away(watch):
    model = mlp()
    return classify(watch, model, adam(model, 3.0), steps=60)


@sick("learning_rate_too_high")
def a_rate_at_which_a_regression_diverges(watch):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.6)
    session = watch(model)
    for _ in range(60):
        x = torch.randn(64, 8)
        loss = F.mse_loss(model(x), x.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return session


@sick("learning_rate_zero")
def a_rate_of_zero(watch):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step // 1000)
    return classify(watch, model, optimizer, after=scheduler.step, steps=80)


@sick("learning_rate_too_low")
def a_rate_far_too_low(watch):
    model = mlp()
    return classify(watch, model, adam(model, 1e-8), steps=120)


@sick("learning_rate_decays_early")
def a_scheduler_stepped_every_batch(watch):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.1)
    return classify(watch, model, optimizer, after=scheduler.step, steps=200)


@sick("weight_decay_too_large")
def a_decay_of_half(watch):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5)
    return classify(watch, model, optimizer, steps=80)
