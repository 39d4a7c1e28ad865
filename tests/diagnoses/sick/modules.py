"""Inputs, layers, initial values and modes that spoil a model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.diagnoses.data import batches, digits
from tests.diagnoses.recipes import adam, classify, cnn, mlp, sick


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


@sick("unregistered_modules")
def parameters_in_a_plain_list(watch):
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = [nn.Parameter(torch.randn(64, 64) / 8) for _ in range(2)]
            self.head = nn.Linear(64, 10)

        def forward(self, x):
            for weight in self.weights:
                x = (x @ weight).relu()
            return self.head(x)

    model = Listed()
    return classify(watch, model, adam(model), steps=30)


@sick("repeated_layer")
def one_layer_times_three(watch):
    model = nn.Sequential(nn.Linear(64, 32), nn.Sequential(*[nn.Linear(32, 32), nn.Tanh()] * 3), nn.Linear(32, 10))
    return classify(watch, model, adam(model), steps=30)


@sick("repeated_layer")
def one_layer_times_three_between_others(watch):
    model = nn.Sequential(nn.Linear(64, 32), *[nn.Linear(32, 32), nn.ReLU()] * 3, nn.Linear(32, 10))
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


@sick("fp16_without_grad_scaler")
def half_precision_without_a_scaler(watch):
    """The loss is divided for an accumulation over many micro-batches, and its gradients are rounded to nothing."""
    model = mlp().half()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    session = watch(model)
    for x, y in batches(*digits(), size=32, steps=40):
        optimizer.zero_grad()
        (F.cross_entropy(model(x.half()).float(), y) / 2**18).backward()
        optimizer.step()
    return session
