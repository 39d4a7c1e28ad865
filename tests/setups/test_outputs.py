"""Activations: whatever a module returns, and of which modules."""

from __future__ import annotations

import collections
import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, distributions, nn

import torchprobe
from tests.models import Transformer, inputs
from tests.setups.outputs import assert_moments, batch, sgd
from tests.setups.reference import l2
from torchprobe.testing import MemoryWriter


@dataclasses.dataclass
class DataclassOutput:
    hidden: Tensor
    index: int = 3


class NamedOutput(NamedTuple):
    index: Tensor
    hidden: Tensor


@dataclasses.dataclass
class ModelOutput(collections.OrderedDict):
    """As in HuggingFace transformers: a dataclass, an ordered mapping of what is not None, and attributes."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden: Tensor | None = None

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if getattr(self, f.name) is not None:
                self[f.name] = getattr(self, f.name)


RETURNS = {
    "tensor": lambda h: h,
    "tuple": lambda h: (h, (h + 1, h + 2)),
    "list after None": lambda h: [None, h],
    "nested": lambda h: ({"state": [h]}, h + 1),
    "dict": lambda h: {"ids": torch.arange(3), "hidden": h, "more": h + 1},
    "dataclass": lambda h: DataclassOutput(h),
    "named tuple": lambda h: NamedOutput(torch.arange(3), h),
    "model output": lambda h: ModelOutput(logits=h, hidden=h + 1),
    "model output with a loss": lambda h: ModelOutput(loss=h.square().mean(), logits=h),
}


class Boxes:
    """A plain object, as detectors return one for each image."""

    def __init__(self, scores: Tensor) -> None:
        self.fields = {"scores": scores}


def normal(h: Tensor) -> distributions.Normal:
    return distributions.Normal(h, 1.0)


# What else a backward pass may run through: how it is returned, and a loss of it.
HELD = {
    "independent": (
        lambda h: distributions.Independent(normal(h), 1),
        lambda out: -out.log_prob(batch(9)[:, :3]).sum(),
    ),
    "one-hot": (
        lambda h: distributions.OneHotCategorical(logits=h),
        lambda out: -out.log_prob(torch.eye(3).repeat(2, 1)).sum(),
    ),
    "transformed": (
        lambda h: distributions.TransformedDistribution(normal(h), [distributions.SigmoidTransform()]),
        lambda out: -out.log_prob(torch.full((6, 3), 0.4)).sum(),
    ),
    "a law by name": (lambda h: {"law": normal(h)}, lambda out: -out["law"].log_prob(batch(9)[:, :3]).sum()),
    "a law beside a value": (lambda h: (normal(h.sin()), h.cos()), lambda out: out[0].mean.square().sum()),
    "objects": (lambda h: [Boxes(h), Boxes(h.sin())], lambda out: out[0].fields["scores"].square().sum()),
    "an object beside a mask": (lambda h: (Boxes(h), torch.ones(6)), lambda out: out[0].fields["scores"].sum()),
}

NOTHING = {"None": None, "int": 7, "string": "done", "integer tensor": torch.arange(3), "empty tuple": ()}


class Returns(nn.Module):
    """Keeps the tensor that its output holds, and returns it in some shape."""

    def __init__(self, shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.shape = shape
        self.hidden = None

    def forward(self, x: Tensor):
        self.hidden = x @ self.weight
        return self.shape(self.hidden)


class Around(nn.Module):
    def __init__(self, shape) -> None:
        super().__init__()
        self.part = Returns(shape)

    def forward(self, x: Tensor) -> Tensor:
        self.part(x)
        return self.part.hidden.square().mean()


@pytest.mark.parametrize("shape", RETURNS)
def test_the_main_tensor_of_an_output_is_found(shape):
    model, writer = Around(RETURNS[shape]), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        model(batch()).backward()
        optimizer.step()
        assert session.step == 1
    assert_moments(writer, "part", model.part.hidden)


@pytest.mark.parametrize("shape", RETURNS)
def test_a_model_may_return_any_of_these_itself(shape):
    model, writer, norms = Returns(RETURNS[shape]), MemoryWriter(), []
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(2):
            optimizer.zero_grad()
            model(batch(k))
            model.hidden.retain_grad()
            model.hidden.square().mean().backward()
            norms.append(l2(model.hidden.grad))
            optimizer.step()
        assert session.step == 2
    assert writer.scalars("activation_grad_norm/root") == [(k + 1, pytest.approx(norm)) for k, norm in enumerate(norms)]


@pytest.mark.parametrize("shape", HELD)
def test_a_backward_pass_is_heard_of_whatever_holds_its_tensors(shape):
    returns, loss_of = HELD[shape]
    model, writer, losses = Returns(returns), MemoryWriter(), []
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(2):
            optimizer.zero_grad()
            loss = loss_of(model(batch(k)))
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
    assert writer.scalars("overview/loss") == [(k + 1, pytest.approx(loss)) for k, loss in enumerate(losses)]


@pytest.mark.parametrize("value", NOTHING)
def test_an_output_without_a_floating_tensor_gives_no_tag_and_no_harm(value):
    model, writer = Around(lambda hidden: NOTHING[value]), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        model(batch()).backward()
        optimizer.step()
        assert session.step == 1
    assert not [tag for tag in writer.tags() if tag.startswith("activation")]
    assert writer.scalars("grad_norm/part.weight")


def test_an_output_with_gradients_that_is_integer_first():
    model, writer = Returns(lambda hidden: (torch.arange(3), hidden)), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1):
        model(batch())[1].sum().backward()
        optimizer.step()
    assert_moments(writer, "root", model.hidden)
    assert writer.value("activation_grad_norm/root") == pytest.approx(18**0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float32])
def test_activations_of_every_precision(dtype):
    model, writer = nn.Linear(4, 3, dtype=dtype), MemoryWriter()
    with torchprobe.instrument(model, writer=writer, every=1), torch.no_grad():
        out = model(batch().to(dtype))
    assert_moments(writer, "root", out)


def test_std_of_activations_with_a_large_mean():
    class Shift(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1e4

    model, writer = Shift(4, 300), MemoryWriter()
    with torchprobe.instrument(model, writer=writer, every=1), torch.no_grad():
        out = model(batch())
    assert_moments(writer, "root", out)


def watched(writer: MemoryWriter) -> set[str]:
    return {tag.split("/", 1)[1] for tag in writer.tags() if tag.startswith("activation_mean/")}


def run(**options) -> MemoryWriter:
    model, writer = Transformer(layers=2), MemoryWriter()
    with torchprobe.instrument(model, writer=writer, every=1, **options):
        model(inputs("transformer"))
    return writer


def test_by_default_leaves_with_parameters_and_attention_and_normalisation_blocks():
    block = {"ln1", "ln2", "attention", "attention.qkv", "attention.proj", "mlp.0", "mlp.2"}
    blocks = {f"blocks.{i}.{name}" for i in range(2) for name in block}
    assert watched(run()) == {"embedding", "head"} | blocks


def test_include_and_exclude_choose_by_name():
    assert watched(run(include="blocks.?.mlp")) == {"blocks.0.mlp", "blocks.1.mlp"}
    assert watched(run(include=["head", "blocks.1"])) == {"head", "blocks.1"}
    assert watched(run(exclude=["blocks.0", "*.mlp"])) == {
        *("embedding", "head", "blocks.1.ln1", "blocks.1.ln2"),
        *("blocks.1.attention", "blocks.1.attention.qkv", "blocks.1.attention.proj"),
    }
    assert watched(run(include="blocks.*", exclude="blocks.*.attention")) == {
        f"blocks.{i}{name}" for i in range(2) for name in ("", ".ln1", ".ln2", ".mlp", *(f".mlp.{j}" for j in range(4)))
    }


def test_activation_gradients_can_be_left_out():
    model, writer = nn.Linear(4, 3), MemoryWriter()
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, probes=[torchprobe.Activations(every=1, gradients=False)]):
        model(batch()).sum().backward()
        optimizer.step()
    assert {tag.split("/")[0] for tag in writer.tags()} == {
        *("activation_mean", "activation_std", "activation_rms", "activation_max_abs"),
        *("activation_zero_fraction", "activation_kurtosis"),
        "overview",
    }
