"""Where NaN comes from: the module is named at any cadence, in the step in which it happened."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import torchprobe
from tests.models import Transformer, inputs
from torchprobe.capture.compiled.tracing import TRACES_GRADIENT_HOOKS
from torchprobe.capture.module_hooks import MARKS
from torchprobe.capture.nan_origin.graph import READS_GRAPHS, of_gradients
from torchprobe.testing import MemoryWriter

AT = 5
reads_graphs = pytest.mark.skipif(not READS_GRAPHS, reason="this torch does not show what a graph keeps")


class Poisoned:
    """A transformer that trains a few steps, one of which goes wrong."""

    def __init__(self) -> None:
        self.model = Transformer(layers=3, dropout=0.0)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.step = 0

    def in_forward(self, name: str, factor: float = float("nan")) -> None:
        module = self.model.get_submodule(name)
        module.register_forward_hook(lambda m, i, out: out * factor if self.step == AT else out)

    def in_backward(self, name: str) -> None:
        module = self.model.get_submodule(name)
        module.register_full_backward_hook(lambda m, given, _: (given[0] * float("nan"),) if self.step == AT else None)

    def train(self, every: int, scale: float = 1.0, rate: float | None = None, **options) -> list[torchprobe.Alert]:
        with torchprobe.instrument(
            self.model, writer=MemoryWriter(), every=every, rules=["non_finite"], **options
        ) as session:
            for self.step in range(1, AT + 4):
                ids = inputs("transformer", self.step)
                loss = F.cross_entropy(self.model(ids).flatten(0, 1), ids.flatten())
                self.optimizer.zero_grad()
                (loss * (scale if self.step == AT else 1.0)).backward()
                if rate is not None and self.step == AT:
                    self.optimizer.param_groups[0]["lr"] = rate
                self.optimizer.step()
        return session.alerts


@pytest.mark.parametrize("every", [1, pytest.param(100, marks=reads_graphs)])
@pytest.mark.parametrize("name", ["embedding", "blocks.0.attention.qkv", "blocks.1.ln1", "blocks.2.mlp.2", "head"])
def test_a_module_that_makes_nan_in_the_forward_pass_is_named(name, every):
    run = Poisoned()
    run.in_forward(name)
    [alert] = run.train(every)
    assert (alert.rule, alert.step, alert.where) == ("non_finite", AT, name)
    assert f"{name} produced NaN from finite inputs" in alert.message
    assert "in the forward pass" in alert.message


@pytest.mark.parametrize("every", [1, pytest.param(100, marks=reads_graphs)])
def test_the_range_of_the_inputs_is_told(every):
    run = Poisoned()
    run.in_forward("blocks.1.mlp.0", float("inf"))
    [alert] = run.train(every)
    assert "blocks.1.mlp.0 produced inf" in alert.message
    assert 0 < float(alert.message.split("max |x| = ")[1].split(")")[0]) < 10


class Logarithm(nn.Module):
    """Of zeros, in one step of a run."""

    def __init__(self, run) -> None:
        super().__init__()
        self.run = run

    def forward(self, x):
        return (x * 0).log() if self.run.step == AT else x


def with_a_logarithm(run):
    block = run.model.blocks[1]
    block.mlp = nn.Sequential(block.mlp[0], Logarithm(run), block.mlp[2])
    run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=1e-3)


def test_a_module_that_makes_minus_infinity_is_named_and_not_the_one_that_makes_nan_of_it():
    run = Poisoned()
    with_a_logarithm(run)
    [alert] = run.train(1)
    assert (alert.step, alert.where) == (AT, "blocks.1.mlp.1")
    assert "blocks.1.mlp.1 produced -inf from finite inputs" in alert.message
    assert "which became NaN in blocks.1.mlp.2" in alert.message


@reads_graphs
def test_between_sampled_steps_the_operation_that_made_minus_infinity_is_told():
    run = Poisoned()
    with_a_logarithm(run)
    [alert] = run.train(100)
    assert (alert.step, alert.where) == (AT, "blocks.1.mlp.0")
    assert "what is done to its output (Log), produced -inf from finite inputs (max |x| = " in alert.message
    assert "inf)" not in alert.message
    assert "which became NaN in blocks.1.mlp.2" in alert.message


def test_a_gradient_that_overflows_in_the_last_layer_is_not_told_behind_itself():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    named = [*model.named_parameters()]
    model[2].weight.grad.fill_(float("inf"))
    assert of_gradients(named).text == "the backward pass gave 2 a gradient with NaN or inf"
    model[2].weight.grad.fill_(1.0)
    model[1].weight.grad.fill_(float("inf"))
    assert of_gradients(named).text.endswith("gave 1 a gradient with NaN or inf, and 2 behind it a finite one")


@pytest.mark.skipif(READS_GRAPHS, reason="this torch shows what a graph keeps")
def test_what_cannot_be_told_is_not_guessed():
    run = Poisoned()
    run.in_forward("blocks.1.ln1")
    [alert] = run.train(100)
    assert (alert.step, alert.where) == (AT, None)
    assert "the model's output holds NaN; a later torch" in alert.message


def test_a_module_without_parameters_is_named_on_a_sampled_step():
    run = Poisoned()
    run.in_forward("blocks.1.mlp.1")  # a ReLU that works in place
    [alert] = run.train(1)
    assert (alert.step, alert.where) == (AT, "blocks.1.mlp.1")


def test_a_module_that_makes_nan_in_the_backward_pass_is_named():
    run = Poisoned()
    run.model = Transformer(layers=3, dropout=0.0)
    for block in run.model.blocks:
        block.mlp[1] = nn.ReLU()  # full backward hooks cannot stand operations in place
    run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=1e-3)
    run.in_backward("blocks.1.mlp.2")
    [alert] = run.train(1)
    assert alert.step == AT
    assert alert.where in ("blocks.1.mlp.2", "blocks.1.mlp.1")  # the gradient between the two
    assert "NaN" in alert.message


def test_between_sampled_steps_the_backward_pass_is_bounded_by_the_gradients():
    run = Poisoned()
    run.model.get_submodule("blocks.1.mlp.2").register_forward_hook(
        lambda m, i, out: out.register_hook(lambda g: g * float("nan")) and None if run.step == AT else None
    )
    [alert] = run.train(100)
    assert (alert.step, alert.where) == (AT, "blocks.1.mlp.2")
    assert "blocks.2.ln1 behind it a finite one" in alert.message


@pytest.mark.parametrize("every", [1, 100])
def test_a_loss_that_is_nan_is_no_modules_fault(every):
    [alert] = Poisoned().train(every, scale=float("nan"))
    assert (alert.step, alert.where) == (AT, None)
    assert "loss" in alert.message


@pytest.mark.parametrize("every", [1, 100])
def test_an_update_that_breaks_parameters_is_told_apart(every):
    [alert] = Poisoned().train(every, rate=float("inf"))
    assert alert.step == (AT if every == 1 else AT + 1)  # histograms see it at once, the next forward pass otherwise
    assert alert.where == "embedding.weight"
    assert "optimizer's" in alert.message


@reads_graphs
def test_nan_in_the_batch_is_no_modules_fault():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=MemoryWriter(), rules=["non_finite"]) as session:
        for step in range(1, 4):
            model(torch.full((2, 4), float("nan") if step == 2 else 1.0)).sum().backward()
            optimizer.step()
    assert session.alerts[0].where is None
    assert "the model's input holds NaN" in session.alerts[0].message


@reads_graphs
def test_a_loop_that_skips_a_nan_loss_goes_on_and_the_alert_ends():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    model[1].register_forward_hook(lambda m, i, out: out * float("nan") if bad[0] else out)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bad = [False]
    with torchprobe.instrument(model, writer=MemoryWriter(), rules=["non_finite"]) as session:
        for i in range(10):
            bad[0] = i == 4
            loss = model(torch.ones(2, 4)).sum()
            if torch.isfinite(loss):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    assert [(a.step, a.ended) for a in session.alerts] == [(5, False), (9, True)]
    assert session.alerts[0].where in ("0", "1")


def test_looking_at_a_checkpointed_model_runs_nothing_again():
    calls = [0]

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

        def run(self, x):
            calls[0] += 1
            return self.inner(x).tanh() * float("nan")

        def forward(self, x):
            return self.head(checkpoint(self.run, x, use_reentrant=False))

    model = Checkpointed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=MemoryWriter(), probes=[], rules=["non_finite"]) as session:
        loss = model(torch.ones(2, 4, requires_grad=True)).sum()
        assert calls == [1]
        loss.backward()
        optimizer.step()
    assert calls == [2]
    assert session.alerts[0].step == 1


def test_persistent_nan_is_said_once_and_looked_at_a_few_times_only(traces):
    run = Poisoned()
    run.in_forward("blocks.1.ln1")
    alerts = run.train(1000, probes=[])
    assert len(alerts) == 1
    assert not traces(run.model)


def test_training_is_bitwise_the_same_while_it_is_looked_at():
    runs = []
    for options in ({}, {"probes": [torchprobe.Provenance(every=1), torchprobe.UnitActivity(every=1)]}):
        torch.manual_seed(0)
        run = Poisoned()
        run.train(1, **options)
        runs.append(copy.deepcopy(run.model.state_dict()))
    torch.manual_seed(0)
    bare = Poisoned()
    for bare.step in range(1, AT + 4):
        ids = inputs("transformer", bare.step)
        loss = F.cross_entropy(bare.model(ids).flatten(0, 1), ids.flatten())
        bare.optimizer.zero_grad()
        loss.backward()
        bare.optimizer.step()
    for state in runs:
        assert all(torch.equal(state[name], tensor) for name, tensor in bare.model.state_dict().items())


def test_marks_do_not_travel_with_a_copy():
    model = nn.Sequential(nn.Linear(4, 3))
    with torchprobe.instrument(model, writer=MemoryWriter(), probes=[torchprobe.Provenance(every=1)]):
        assert model[0].__dict__[MARKS] is not None
        assert MARKS not in copy.deepcopy(model)[0].__dict__
    assert MARKS not in model[0].__dict__


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Using `torch.compile", "ignore:The .grad attribute")
@pytest.mark.parametrize("whole", [True, False], ids=["the whole model", "its blocks"])
def test_a_compiled_model_is_left_alone_and_its_nan_is_still_seen(whole):
    torch._dynamo.reset()
    graphs = [0]

    def backend(graph, example):
        graphs[0] += 1
        return graph.forward

    def compiled(module):
        return torch.compile(module, fullgraph=True, backend=backend)

    run = Poisoned()
    callee = run.model
    if whole:
        callee = compiled(run.model)
    else:
        for i, block in enumerate(run.model.blocks):
            run.model.blocks[i] = compiled(block)
    probes = [torchprobe.Provenance(every=2), torchprobe.UnitActivity(every=2)]
    with torchprobe.instrument(run.model, writer=MemoryWriter(), probes=probes, rules=["non_finite"]) as session:
        for run.step in range(1, AT + 3):
            ids = inputs("transformer", run.step)
            loss = F.cross_entropy(callee(ids).flatten(0, 1), ids.flatten())
            run.optimizer.zero_grad()
            (loss * (float("nan") if run.step == AT else 1.0)).backward()
            run.optimizer.step()
    torch._dynamo.reset()
    # An older torch guards on the number of hooks: one graph with those of the first step, one without.
    assert graphs[0] <= (1 if whole else 3) + (not TRACES_GRADIENT_HOOKS)
    assert session.alerts[0].step == AT
