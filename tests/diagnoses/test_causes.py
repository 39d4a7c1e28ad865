"""What keeps a run from learning is not put down to something else, and what still holds is not said to be over."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchprobe
from tests.diagnoses.data import digits
from tests.diagnoses.recipes import classify, mlp
from tests.diagnoses.sick import SICK
from torchprobe.testing import MemoryWriter

pytestmark = pytest.mark.filterwarnings("ignore")


def train(model, rate, steps=110, **options):
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    clip = options.pop("clip", None)

    def clipped(*_):
        nn.utils.clip_grad_norm_(model.parameters(), clip)

    if clip is not None:
        optimizer.register_step_pre_hook(clipped)
    watch = lambda model: torchprobe.instrument(model, writer=MemoryWriter())  # noqa: E731
    session = classify(watch, model, optimizer, steps, **options)
    session.detach()
    return session


def too_low(session):
    return [alert.message for alert in session.alerts if alert.rule == "learning_rate_too_low"]


def test_gradients_that_vanish_are_not_put_down_to_the_learning_rate():
    torch.manual_seed(0)
    deep = [part for _ in range(12) for part in (nn.Linear(64, 64), nn.Sigmoid())]
    session = train(nn.Sequential(*deep, nn.Linear(64, 10)), 0.1)
    assert "vanishing_gradient" in {alert.rule for alert in session.alerts}
    assert too_low(session) == []


def test_gradients_that_are_clipped_to_next_to_nothing_are_said_to_be():
    torch.manual_seed(0)
    [said] = too_low(train(mlp(), 0.1, clip=1e-4))
    assert "or gradients are clipped too far, from " in said
    assert said.endswith(" to 0.0001")
    torch.manual_seed(0)
    [said] = too_low(train(mlp(), 1e-6, clip=1e-1))
    assert "clipped" not in said


def recorded(name):
    torch.manual_seed(0)
    session = SICK[name][1](lambda model: torchprobe.instrument(model, writer=MemoryWriter()))
    session.detach()
    return session


@pytest.mark.parametrize("name", ["layers_in_a_plain_list", "one_layer_times_three", "dropout_keeps_a_tenth"])
def test_what_the_model_is_made_like_does_not_end(name):
    session = recorded(name)
    assert session.step >= 20  # four samples and more after the first
    assert [alert.ended for alert in session.alerts if alert.rule == SICK[name][0]] == [False]


def test_classes_that_come_later_are_not_said_never_to_occur():
    x, y = digits()
    order, seen = y.argsort(stable=True), []

    class InOrder(torch.utils.data.Dataset):
        def __len__(self):
            return len(order)

        def __getitem__(self, i):
            return x[order[i]], y[order[i]]

    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    session = torchprobe.instrument(model, writer=MemoryWriter(), probes=[torchprobe.Diagnosis(every=1)])
    for inputs, targets in torch.utils.data.DataLoader(InOrder(), batch_size=10):
        seen += targets.tolist()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        if len(seen) == 600:
            break
    session.detach()
    assert 1 < len({*seen}) < 10
    assert "class_never_occurs" not in session.summary()


class Speech(nn.Module):
    """Shifts its labels inside: of the tokens before it says the next one, and returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.hear, self.embed, self.head = nn.Linear(4, 16), nn.Embedding(12, 16), nn.Linear(16, 12)

    def forward(self, sounds, labels):
        before = nn.functional.pad(labels[:, :-1], (1, 0))
        logits = self.head(self.embed(before) + self.hear(sounds).mean(1, keepdim=True))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


@pytest.mark.parametrize("by_name", [True, False])
def test_labels_that_a_model_is_called_with_are_none_of_its_inputs(by_name):
    torch.manual_seed(0)
    model = Speech()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1) as session:
        for _ in range(8):
            sounds, labels = torch.randn(8, 5, 4), torch.randint(12, (8, 7))
            loss, _ = model(sounds, labels=labels) if by_name else model(sounds, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        session.flush()
        assert not [remark for remark in session.remarks if remark.rule == "targets_equal_inputs"]
