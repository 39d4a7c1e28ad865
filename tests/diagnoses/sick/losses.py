"""Losses that do not suit the output, and data that they cannot learn from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.diagnoses.data import digits, numbers, sentences, two_classes
from tests.diagnoses.recipes import Judge, LanguageModel, Seeing, adam, classify, cnn, judge_sentences, mlp, sick


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


@sick("nll_loss_without_log_softmax")
def log_softmax_over_the_batch(watch):
    model = nn.Sequential(*mlp(), nn.LogSoftmax(dim=0))
    return classify(watch, model, adam(model), steps=60, loss=F.nll_loss)


@sick("broadcast_targets")
def absolute_error_of_a_column_and_a_row(watch):
    model, (x, y) = mlp(8, 1), numbers()
    return classify(watch, model, adam(model), steps=60, data=(x, y[:, 0]), loss=F.l1_loss)


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


@sick("at_chance")
def shuffled_labels(watch):
    model, (x, y) = mlp(), digits()
    return classify(watch, model, adam(model, 1e-3), data=(x, y[torch.randperm(len(y))]), steps=200)


@sick("at_chance")
def a_layer_whose_units_are_all_dead(watch):
    model = mlp()
    model[2].bias.data.fill_(-100.0)
    return classify(watch, model, adam(model, 1e-3), steps=170)


@sick("attends_to_future")
def a_language_model_without_a_mask(watch):
    model = Seeing()
    optimizer, session = adam(model), watch(model)
    for ids in sentences(steps=24, size=8):
        optimizer.zero_grad()
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    return session


@sick("attends_to_padding")
def sentences_of_any_length_without_a_padding_mask(watch):
    return judge_sentences(watch, Judge(masked=False))


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
