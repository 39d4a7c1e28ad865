"""Planted bugs, each with the rule that names it. As in `healthy`, a recipe is a function of `watch`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.diagnoses.data import batches, digits, numbers, sentences, two_classes
from tests.diagnoses.healthy import LanguageModel, _TwoHeads, classify, cnn, mlp

SICK = {}
REMARKS = {}


def sick(rule, among=SICK):
    """Into the table, under the rule that is to name it."""

    def take(recipe):
        among[recipe.__name__] = rule, recipe
        return recipe

    return take


def adam(model, rate=3e-3):
    return torch.optim.Adam(model.parameters(), rate)


# ---- optimizers


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
    class Cut(_TwoHeads):
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


@sick("no_optimizer_step")
def the_optimizer_never_steps(watch):
    model = mlp()
    optimizer, session = adam(model), watch(model)
    for x, y in batches(*digits(), steps=220):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
    return session


# ---- losses


@sick("softmax_before_cross_entropy")
def softmax_in_the_model(watch):
    model = nn.Sequential(*mlp(), nn.Softmax(-1))
    return classify(watch, model, adam(model), steps=60)


@sick("softmax_before_cross_entropy")
def softmax_behind_the_model(watch):
    model = cnn()
    loss = lambda out, y: F.cross_entropy(out.softmax(1), y)  # noqa: E731
    return classify(watch, model, adam(model), steps=60, data=digits(False), loss=loss)


@sick("sigmoid_before_cross_entropy")
def sigmoid_before_cross_entropy(watch):
    model = nn.Sequential(*mlp(), nn.Sigmoid())
    return classify(watch, model, adam(model), steps=60)


@sick("sigmoid_before_bce_with_logits")
def sigmoid_twice(watch):
    model = nn.Sequential(*mlp(8, 1), nn.Sigmoid(), nn.Flatten(0))
    loss = nn.BCEWithLogitsLoss()
    return classify(watch, model, adam(model), steps=60, data=two_classes(), loss=loss)


@sick("nll_loss_without_log_softmax")
def nll_of_a_softmax(watch):
    model = nn.Sequential(*mlp(), nn.Softmax(-1))
    return classify(watch, model, adam(model), steps=60, loss=F.nll_loss)


@sick("nll_loss_without_log_softmax")
def nll_of_raw_scores(watch):
    model = mlp()
    return classify(watch, model, adam(model), steps=60, loss=F.nll_loss)


@sick("broadcast_targets")
def mse_of_a_column_and_a_row(watch):
    model, (x, y) = mlp(8, 1), numbers()
    return classify(watch, model, adam(model), steps=60, data=(x, y[:, 0]), loss=F.mse_loss)


@sick("broadcast_targets")
def difference_of_a_row_and_a_column(watch):
    model, (x, y) = nn.Sequential(*mlp(8, 1), nn.Flatten(0)), numbers()
    loss = lambda out, y: ((y - out) ** 2).mean()  # noqa: E731
    return classify(watch, model, adam(model), steps=60, data=(x, y), loss=loss)


@sick("relu_on_output")
def relu_on_logits(watch):
    model = nn.Sequential(*mlp(), nn.ReLU())
    return classify(watch, model, adam(model), steps=60)


@sick("relu_on_output")
def relu_on_numbers_of_either_sign(watch):
    model = nn.Sequential(*mlp(8, 1), nn.ReLU())
    return classify(watch, model, adam(model), steps=60, data=numbers(), loss=F.mse_loss)


@sick("large_initial_loss")
def a_head_with_huge_weights(watch):
    model = mlp()
    model[4].weight.data.mul_(100)
    return classify(watch, model, adam(model), steps=30)


@sick("unshuffled_batches")
def batches_sorted_by_class(watch):
    model, (x, y) = mlp(), digits()
    order = y.argsort(stable=True)
    optimizer, session = adam(model), watch(model)
    for _ in range(5):
        for index in order.split(16):
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    return session


# ---- learning


@sick("at_chance")
def shuffled_labels(watch):
    model, (x, y) = mlp(), digits()
    return classify(watch, model, adam(model, 1e-3), data=(x, y[torch.randperm(len(y))]), steps=200)


@sick("at_chance")
def a_rate_far_too_high(watch):
    model, (x, y) = mlp(), digits()
    return classify(watch, model, adam(model, 3.0), data=(x, y), steps=200)


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


# ---- targets that are known


class Seeing(LanguageModel):
    def forward(self, ids):
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1]))
        return self.head(self.blocks(x))


@sick("attends_to_future")
def a_language_model_without_a_mask(watch):
    model = Seeing()
    optimizer, session = adam(model), watch(model)
    for ids in sentences(steps=24, size=8):
        optimizer.zero_grad()
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    return session


@sick("unshifted_targets")
def a_language_model_that_forgot_to_shift(watch):
    model = LanguageModel()
    optimizer, session = adam(model), watch(model)
    for ids in sentences(steps=24, size=8):
        optimizer.zero_grad()
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
    return session


@sick("target_leak")
def the_label_among_the_features(watch):
    x, y = digits()
    model = mlp()
    features = torch.cat((x[:, :63], (y[:, None] - 4.5) / 3), 1)
    return classify(watch, model, adam(model), data=(features, y), steps=60)


# ---- modules


@sick("unscaled_inputs")
def pixels_up_to_255(watch):
    x, y = digits()
    model = mlp()
    return classify(watch, model, adam(model), data=((x * 60 + 128).clamp(0, 255), y), steps=60)


@sick("constant_inputs")
def inputs_rounded_away(watch):
    x, y = digits()
    model = mlp()
    return classify(watch, model, adam(model), data=((x / 100).round(), y), steps=60)


@sick("saturated_units")
def saturated_tanh(watch):
    model = mlp(act=nn.Tanh)
    for layer in (model[0], model[2]):
        layer.weight.data.mul_(30)
    return classify(watch, model, adam(model), steps=60)


@sick("symmetric_initialisation")
def equal_weights(watch):
    model = mlp()
    for layer in (model[0], model[2], model[4]):
        nn.init.constant_(layer.weight, 0.05)
    return classify(watch, model, adam(model), steps=30)


@sick("symmetric_initialisation")
def weights_of_zero(watch):
    model = mlp()
    for layer in (model[0], model[2], model[4]):
        nn.init.zeros_(layer.weight)
    return classify(watch, model, adam(model), steps=30)


@sick("unregistered_modules")
def layers_in_a_plain_list(watch):
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
    return classify(watch, model, adam(model), steps=30)


@sick("repeated_layer")
def one_layer_times_three(watch):
    model = nn.Sequential(nn.Linear(64, 32), nn.Sequential(*[nn.Linear(32, 32), nn.Tanh()] * 3), nn.Linear(32, 10))
    return classify(watch, model, adam(model), steps=30)


@sick("dropout_too_high")
def dropout_keeps_a_tenth(watch):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.9), nn.Linear(64, 10))
    return classify(watch, model, adam(model), steps=30)


@sick("batch_norm_few_values")
def batch_norm_of_two_examples(watch):
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    return classify(watch, model, adam(model), steps=60, size=2)


@sick("graph_kept")
def losses_added_up_with_their_graphs(watch):
    model, total = mlp(), 0.0
    optimizer, session = adam(model), watch(model)
    for x, y in batches(*digits(), steps=80):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = total + loss
    return session


@sick("validated_in_training_mode")
def validation_without_eval(watch):
    model, (x, y) = cnn(), digits(False)
    optimizer, session = adam(model), watch(model)
    for _ in range(5):
        for a, b in batches(x[:600], y[:600], steps=18):
            optimizer.zero_grad()
            F.cross_entropy(model(a), b).backward()
            optimizer.step()
        with torch.no_grad():
            for a in x[600:].split(50):
                model(a)
    return session


# ---- what may be meant


@sick("trained_in_eval_mode", REMARKS)
def training_goes_on_in_evaluation_mode(watch):
    model = cnn().eval()
    return classify(watch, model, adam(model), data=digits(False), steps=40)


@sick("class_never_occurs", REMARKS)
def labels_from_one_to_nine(watch):
    x, y = digits()
    model = mlp()
    keep = y > 0
    return classify(watch, model, adam(model), data=(x[keep], y[keep]), steps=220)


@sick("unused_parameters", REMARKS)
def a_backbone_under_no_grad(watch):
    class Frozen(_TwoHeads):
        def forward(self, x):
            with torch.no_grad():
                h = self.body(x)
            return self.a(h)

    model = Frozen()
    return classify(watch, model, adam(model), steps=60)


@sick("targets_equal_inputs", REMARKS)
def an_autoencoder_of_tokens(watch):
    model = Seeing()
    optimizer, session = adam(model), watch(model)
    for ids in sentences(steps=12, size=8):
        optimizer.zero_grad()
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
    return session


@sick("dropout_in_validation", REMARKS)
def validation_with_dropout(watch):
    model, (x, y) = nn.Sequential(nn.Linear(64, 32), nn.Dropout(0.3), nn.Linear(32, 10)), digits()
    optimizer, session = adam(model), watch(model)
    for _ in range(3):
        for a, b in batches(x, y, steps=20):
            optimizer.zero_grad()
            F.cross_entropy(model(a), b).backward()
            optimizer.step()
        with torch.no_grad():
            model(x)
    return session
