"""Optimizers, their schedules, and loops around them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.diagnoses.data import batches, digits, numbers
from tests.diagnoses.recipes import classify, cnn, healthy, mlp


@healthy
def mlp_sgd(watch):
    model = mlp()
    return classify(watch, model, torch.optim.SGD(model.parameters(), 0.1), steps=200)


@healthy
def mlp_adam(watch):
    model = mlp()
    return classify(watch, model, torch.optim.Adam(model.parameters(), 3e-3), steps=200)


@healthy
def mlp_tanh_momentum(watch):
    model = mlp(act=nn.Tanh)
    return classify(watch, model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4))


@healthy
def mlp_gelu_adamw(watch):
    model = mlp(act=nn.GELU)
    return classify(watch, model, torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.1))


@healthy
def mlp_rmsprop(watch):
    model = mlp(act=nn.SiLU)
    return classify(watch, model, torch.optim.RMSprop(model.parameters(), 1e-3))


@healthy
def gradient_accumulation(watch):
    model = mlp()
    optimizer, session = torch.optim.Adam(model.parameters(), 3e-3), watch(model)
    for i, (x, y) in enumerate(batches(*digits(), size=16, steps=160)):
        (F.cross_entropy(model(x), y) / 4).backward()
        if i % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    return session


@healthy
def zeroed_in_place(watch):
    model = mlp()
    optimizer, session = torch.optim.SGD(model.parameters(), 0.1), watch(model)
    for x, y in batches(*digits(), steps=80):
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return session


@healthy
def model_zeroes_its_gradients(watch):
    model = mlp()
    optimizer, session = torch.optim.SGD(model.parameters(), 0.1), watch(model)
    for x, y in batches(*digits(), steps=80):
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
    return session


@healthy
def lbfgs(watch):
    model, (x, y) = mlp(8, 1, act=nn.Tanh), numbers()
    optimizer, session = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4), watch(model)

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    for _ in range(30):
        optimizer.step(closure)
    return session


@healthy
def sharpness_aware(watch):
    model = mlp()
    optimizer, session = torch.optim.SGD(model.parameters(), 0.1), watch(model)
    for x, y in batches(*digits(), steps=80):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        moved = [(p, 0.05 * p.grad / (p.grad.norm() + 1e-8)) for p in model.parameters()]
        with torch.no_grad():
            for p, e in moved:
                p.add_(e)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p, e in moved:
                p.sub_(e)
        optimizer.step()
    return session


@healthy
def one_optimizer_a_part(watch):
    model, (x, y) = mlp(), digits()
    optimizers = [torch.optim.SGD(model[:3].parameters(), 0.1), torch.optim.Adam(model[3:].parameters(), 3e-3)]
    session = watch(model)
    for a, b in batches(x, y, steps=80):
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.cross_entropy(model(a), b).backward()
        for optimizer in optimizers:
            optimizer.step()
    return session


@healthy
def the_head_alone_after_the_whole(watch):
    """Its norm is a fraction of the model's, which no weight decay has shrunk."""
    model = mlp()
    session = classify(watch, model, torch.optim.AdamW(model.parameters(), 3e-4), steps=20)
    model[:4].requires_grad_(False)
    optimizer = torch.optim.AdamW(model[4].parameters(), 3e-4)
    for x, y in batches(*digits(), steps=40):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return session


@healthy
def cosine_schedule(watch):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    return classify(watch, model, optimizer, after=scheduler.step)


@healthy
def cosine_schedule_with_restarts_that_samples_meet_at_their_lows(watch):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 50)
    return classify(watch, model, optimizer, steps=110, after=scheduler.step)


@healthy
def step_schedule(watch):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [50, 80], 0.1)
    return classify(watch, model, optimizer, after=scheduler.step)


@healthy
def warm_up_from_zero(watch):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 40))
    return classify(watch, model, optimizer, after=scheduler.step)


@healthy
def averaged_weights_and_their_batch_statistics(watch):
    model, (x, y) = cnn(), digits(False)
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    session = classify(watch, model, optimizer, steps=100, data=(x, y), after=lambda: average.update_parameters(model))
    torch.optim.swa_utils.update_bn([(x[:64],), (x[64:128],)], model)
    return session


@healthy
def half_precision_with_a_scaler_or_bfloat16(watch):
    model = mlp()
    optimizer, session = torch.optim.Adam(model.parameters(), 3e-3), watch(model)
    for x, y in batches(*digits(), steps=80):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return session


@healthy
def small_batches(watch):
    model = mlp()
    return classify(watch, model, torch.optim.SGD(model.parameters(), 0.02, momentum=0.9), size=4, steps=200)


@healthy
def full_batch(watch):
    model, (x, y) = mlp(8, 1), numbers()
    optimizer, session = torch.optim.Adam(model.parameters(), 1e-2), watch(model)
    for _ in range(80):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return session


@healthy
def an_optimizer_that_holds_copies_in_another_precision(watch):
    model = mlp()
    masters = [p.detach().clone().double().requires_grad_() for p in model.parameters()]
    optimizer, session = torch.optim.SGD(masters, 0.1), watch(model)
    for x, y in batches(*digits(), steps=60):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p, m in zip(model.parameters(), masters, strict=True):
                m.grad = p.grad.double()
        optimizer.step()
        with torch.no_grad():
            for p, m in zip(model.parameters(), masters, strict=True):
                p.copy_(m)
        session.next_step()
    return session
