"""What else users do with their model while it is watched: covered, or left alone; never a changed result."""

from __future__ import annotations

import copy
import io
import logging
import multiprocessing

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.utils.data import DataLoader, Dataset

import torchprobe
from torchprobe.testing import MemoryWriter

ACTIVATION = "activation_mean/0"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def batch(seed: int = 0) -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, steps: int = 3, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    for k in range(steps):
        optimizer.zero_grad()
        model(batch(k)).square().mean().backward()
        optimizer.step()
    return model


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(weights(one), weights(other), strict=True):
        assert torch.equal(a, b)


def steps(writer: MemoryWriter, tag: str) -> list[int]:
    return [step for step, _ in writer.scalars(tag)]


# ---- parametrizations


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["weight_norm", "orthogonal", "spectral_norm"])
def test_a_parametrized_layer_is_watched_as_the_layer_it_is(kind, bias):
    def made() -> nn.Module:
        model = net()
        if not bias:
            model[0].register_parameter("bias", None)
        getattr(nn.utils.parametrizations, kind)(model[0])
        return model

    model, writer = made(), MemoryWriter()
    with torchprobe.instrument(model, writer=writer, every=1):
        train(model)
    assert_same(train(made()), model)
    captured = sorted(tag for tag in writer.tags() if tag.startswith("activation_mean/"))
    assert captured == ["activation_mean/0", "activation_mean/2"]
    assert any(tag.startswith("grad_norm/0.parametrizations.weight.original") for tag in writer.tags())


def test_lazy_layers_are_watched_from_their_first_pass_on():
    model, writer = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(2)), MemoryWriter()
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        model(batch())
        train(model)
        assert session.step == 3
    assert steps(writer, "grad_norm/0.weight") == [1, 2, 3]
    assert steps(writer, ACTIVATION) == [1, 2, 3]


# ---- copies


def test_averaged_copies_of_the_weights_are_not_watched(traces):
    model, writer = net(), MemoryWriter()
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        train(model, 1)
        average = torch.optim.swa_utils.AveragedModel(model)
        with torch.no_grad():
            average(batch())
        average.update_parameters(model)
        train(model, 2)
        assert session.step == 3
        assert torchprobe.session_of(average) is None
    assert steps(writer, ACTIVATION) == [1, 2, 3]
    assert not writer.scalars(f"val/{ACTIVATION}")


# ---- torch.func


def test_function_transforms_over_the_model_are_left_alone_and_told_once(caplog):
    model, writer = net(), MemoryWriter()
    values = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss(values, x):
        return functional_call(model, values, (x,)).square().sum()

    def transformed() -> list[torch.Tensor]:
        return [
            *grad(loss)(values, batch()).values(),
            vmap(lambda x: functional_call(model, values, (x,)))(batch()),
            *vmap(grad(loss), in_dims=(None, 0))(values, batch()).values(),
            jacrev(lambda x: functional_call(model, values, (x,)))(batch()),
        ]

    expected = transformed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for a, b in zip(expected, transformed(), strict=True):
            assert torch.equal(a, b)
        train(model, 2, optimizer)
        assert session.step == 2
    assert steps(writer, ACTIVATION) == [1, 2]
    assert ["torch.func" in line for line in caplog.messages] == [True]


def test_calls_with_other_weights_before_training_are_no_step_of_it():
    model, writer = net(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        functional_call(model, values, (batch(),))
        train(model, 2, optimizer)
        assert session.step == 2
    assert steps(writer, "grad_norm/0.weight") == [1, 2]
    assert steps(writer, ACTIVATION) == [1, 2]  # nothing is left of a pass whose graph was dropped


# ---- tracing


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_model_is_the_plain_one():
    model = net()
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1):
        traced = torch.jit.trace(model, batch())
        assert torch.equal(traced(batch(1)), model(batch(1)))
    plain = torch.jit.trace(net(), batch())
    assert [node.kind() for node in traced.inlined_graph.nodes()] == [n.kind() for n in plain.inlined_graph.nodes()]
    torch.jit.save(traced, io.BytesIO())


def test_a_model_in_inference_mode_is_seen_and_training_goes_on():
    model, writer = net(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        train(model, 1, optimizer)
        model.eval()
        with torch.inference_mode():
            output = model(batch(9))
        model.train()
        assert output.is_inference()
        train(model, 2, optimizer)
        assert session.step == 3
    assert steps(writer, f"val/{ACTIVATION}") == [1]
    assert steps(writer, ACTIVATION) == [1, 2, 3]


# ---- workers


class Embedded(Dataset):
    """Rows that the watched model itself has embedded, in a worker."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> torch.Tensor:
        with torch.no_grad():
            return self.model(batch(i))[0]


@pytest.mark.parametrize("method", [m for m in ("fork", "spawn") if m in multiprocessing.get_all_start_methods()])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_data_workers_that_hold_the_model_record_nothing(method):
    model, writer = net(), MemoryWriter()
    plain = torch.stack([model(batch(i))[0].detach() for i in range(8)])
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        train_weights = copy.deepcopy(model.state_dict())
        loader = DataLoader(Embedded(model), batch_size=4, num_workers=1, multiprocessing_context=method)
        assert torch.equal(torch.cat(list(loader)), plain)
        assert session.step == 0
        train(model, 2)
        assert session.step == 2
    assert train_weights.keys() == model.state_dict().keys()
    assert steps(writer, ACTIVATION) == [1, 2]


# ---- what a model need not have


def test_no_warning_for_attention_in_a_model_that_has_none_unless_it_was_asked_for(caplog):
    for probes, warned in ((None, False), ([torchprobe.Attention(every=1)], True)):
        caplog.clear()
        model = net()
        with torchprobe.instrument(model, writer=MemoryWriter(), probes=probes, every=1) as session:
            train(model, 4)
        assert "Attention" in session.summary()
        messages = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
        assert any("Attention" in message for message in messages) is warned


def test_passes_that_learn_shapes_on_meta_tensors_are_none():
    """As frameworks do that build a model lazily, or count its operations."""

    class Wide(nn.Sequential):
        def forward(self, x):
            if x.is_meta:
                return torch.empty(len(x), 2, device="meta")
            return super().forward(x)

    model, writer = Wide(*net()), MemoryWriter()
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        model(torch.empty(3, 4, device="meta"))
        train(model)
        model(torch.empty(3, 4, device="meta"))
    assert session.step == 3
    assert steps(writer, "overview/loss") == steps(writer, ACTIVATION) == [1, 2, 3]
    assert not [tag for tag in writer.tags() if tag.startswith("val/")]


def test_modules_that_define_equality_by_element_are_told_apart_by_identity():
    """As containers of tensors do that are modules too."""

    class Container(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x)

        def __eq__(self, other):
            raise RuntimeError("Converting this to a boolean value is not permitted")

        __hash__ = nn.Module.__hash__

    bare = train(nn.Sequential(Container(), nn.Tanh(), Container()))
    torch.manual_seed(0)
    model, writer = copy.deepcopy(bare), MemoryWriter()
    with torchprobe.instrument(model, writer=writer, every=1):
        train(model)
    train(bare)
    assert_same(bare, model)
    assert steps(writer, "activation_mean/0.inner") == [1, 2, 3]


def test_another_default_dtype_while_the_model_runs_changes_no_value(caplog):
    found = []
    for default in (torch.float32, torch.float64, torch.bfloat16):
        model, writer, x = net(), MemoryWriter(), batch()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torchprobe.instrument(model, writer=writer, every=1):
            torch.set_default_dtype(default)
            try:
                model(x).square().mean().backward()
                optimizer.step()
                model.eval()
                with torch.no_grad():
                    model(x)
            finally:
                torch.set_default_dtype(torch.float32)
        found.append({tag: writer.scalars(tag) for tag in writer.tags() if not tag.startswith(("perf", "overview/pr"))})
    assert found[0] == found[1] == found[2]
    assert "failed" not in caplog.text
