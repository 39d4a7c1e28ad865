"""Healthy recipes, many of them odd on purpose. Each is a function of `watch`, which instruments a model."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.diagnoses.data import batches, digits, numbers, sentences, two_classes

HEALTHY = {}


def healthy(recipe):
    """Into the gallery."""
    HEALTHY[recipe.__name__] = recipe
    return recipe


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
def gradient_accumulation(watch):
    model = mlp()
    optimizer, session = torch.optim.Adam(model.parameters(), 3e-3), watch(model)
    for i, (x, y) in enumerate(batches(*digits(), size=16, steps=240)):
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
    for a, _ in batches(x, y, steps=150):
        one, two = (F.normalize(model(a + 0.2 * torch.randn_like(a)), dim=1) for _ in range(2))
        optimizer.zero_grad()
        F.cross_entropy(one @ two.T / 0.2, torch.arange(len(a))).backward()
        optimizer.step()
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


class _TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.a, self.b = nn.Sequential(nn.Linear(64, 32), nn.ReLU()), nn.Linear(32, 10), nn.Linear(32, 2)

    def forward(self, x):
        h = self.body(x)
        return {"digit": self.a(h), "odd": self.b(h)}


@healthy
def a_head_that_is_not_used(watch):
    model = _TwoHeads()
    loss = lambda out, y: F.cross_entropy(out["digit"], y)  # noqa: E731
    return classify(watch, model, torch.optim.Adam(model.parameters(), 3e-3), loss=loss)


@healthy
def two_heads(watch):
    model = _TwoHeads()
    loss = lambda out, y: F.cross_entropy(out["digit"], y) + F.cross_entropy(out["odd"], y % 2)  # noqa: E731
    return classify(watch, model, torch.optim.Adam(model.parameters(), 3e-3), loss=loss)


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
def fine_tuning_in_evaluation_mode(watch):
    model = cnn()
    model.eval()
    return classify(watch, model, torch.optim.Adam(model.parameters(), 3e-3), data=digits(False))


@healthy
def cosine_schedule(watch):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    return classify(watch, model, optimizer, after=scheduler.step)


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
def zero_initialised_head(watch):
    model = mlp()
    nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)
    return classify(watch, model, torch.optim.Adam(model.parameters(), 3e-3))


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
def small_batches(watch):
    model = mlp()
    return classify(watch, model, torch.optim.SGD(model.parameters(), 0.02, momentum=0.9), size=4, steps=300)


@healthy
def full_batch(watch):
    model, (x, y) = mlp(8, 1), numbers()
    optimizer, session = torch.optim.Adam(model.parameters(), 1e-2), watch(model)
    for _ in range(80):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return session


# ---- what a diagnosis might take for its bug


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
