"""What may be meant: a remark names it, no alert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.diagnoses.data import batches, digits, sentences
from tests.diagnoses.recipes import REMARKS, Seeing, TwoHeads, adam, classify, cnn, mlp, sick


@sick("trained_in_eval_mode", REMARKS)
def training_goes_on_in_evaluation_mode(watch):
    model = cnn().eval()
    return classify(watch, model, adam(model), data=digits(False), steps=40)


@sick("class_never_occurs", REMARKS)
def labels_from_one_to_nine(watch):
    x, y = digits()
    model = mlp()
    keep = y > 0
    return classify(watch, model, adam(model), data=(x[keep], y[keep]), steps=110)


@sick("unused_parameters", REMARKS)
def a_backbone_under_no_grad(watch):
    class Frozen(TwoHeads):
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


@sick("unused_embedding_rows", REMARKS)
def a_vocabulary_of_which_half_is_used(watch):
    model = nn.Sequential(nn.Embedding(100, 8), nn.Flatten(), nn.Linear(64, 2))
    optimizer, session = adam(model), watch(model)
    for _ in range(12):
        ids = torch.randint(50, (64, 8))
        optimizer.zero_grad()
        F.cross_entropy(model(ids), (ids.sum(1) > 200).long()).backward()
        optimizer.step()
    return session


@sick("repeated_batch", REMARKS)
def a_loader_begun_anew_for_each_batch(watch):
    model, (x, y) = mlp(), digits()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 32)
    optimizer, session = adam(model), watch(model)
    for _ in range(12):
        a, b = next(iter(loader))
        optimizer.zero_grad()
        F.cross_entropy(model(a), b).backward()
        optimizer.step()
    return session
