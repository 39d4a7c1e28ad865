"""A model whose class calls itself without torch's hooks, as gpytorch's do: what is not seen is said."""

import logging

import pytest
import torch
from torch import nn

import torchprobe
from torchprobe.testing import MemoryWriter


class WithoutHooks(nn.Linear):
    def __call__(self, *args):
        return self.forward(*args)


class WithHooks(nn.Linear):
    def __call__(self, *args):
        return super().__call__(*args)


def lines_of(model, caplog, steps=4):
    optimizer, writer = torch.optim.SGD(model.parameters(), 0.1), MemoryWriter()
    with caplog.at_level(logging.WARNING, "torchprobe"):
        session = torchprobe.instrument(model, writer=writer, probes=[torchprobe.Uncertainty(every=1)])
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(2, 3)).square().mean().backward()
            optimizer.step()
        session.detach()
    return [r.getMessage() for r in caplog.records if "runs no hooks" in r.getMessage()], session.summary()


def test_a_class_that_calls_itself_without_hooks_is_named_once(caplog):
    lines, summary = lines_of(WithoutHooks(3, 2), caplog)
    assert len([line for line in lines if line.startswith("WithoutHooks.__call__ runs no hooks")]) == 1
    assert "call session.log_predictions" in summary


@pytest.mark.parametrize("kind", [WithHooks, nn.Linear])
def test_others_are_not(caplog, kind):
    assert lines_of(kind(3, 2), caplog)[0] == []


def test_what_cannot_be_called_is_not_said_to_call_itself(caplog):
    model = nn.ParameterList([torch.ones(3)])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with caplog.at_level(logging.WARNING, "torchprobe"), torchprobe.instrument(model, writer=MemoryWriter(), every=1):
        for _ in range(3):
            optimizer.zero_grad()
            model[0].square().sum().backward()
            optimizer.step()
    assert "__call__" not in caplog.text
