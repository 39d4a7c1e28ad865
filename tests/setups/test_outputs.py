"""Activations: whatever a module returns, however often it runs."""

from __future__ import annotations

import collections
import copy
import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import torchprobe
from tests.models import Transformer, inputs
from tests.setups.reference import l2, moments, wide
from torchprobe.testing import MemoryWriter


def batch(seed: int = 0, size: int = 6) -> Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def assert_moments(writer: MemoryWriter, where: str, elements: Tensor, step: int = 1) -> None:
    for key, value in moments(elements).items():
        found = writer.value(f"activation_{key}/{where}", step=step)
        cancels = {"mean": 1e-7 * elements.abs().max().item(), "kurtosis": 1e-6 * (value + 3)}
        rounding = cancels.get(key, 1e-12)
        assert found == pytest.approx(value, rel=1e-6, abs=rounding), f"{key} of {where} in step {step}"


# ---- what a module returns


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


# ---- several calls, micro-batches


class Twice(nn.Module):
    """Runs one module several times in a pass, on inputs of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = self.fc(x)
        second = self.fc(3 + 5 * first[:2])
        return first.mean() + self.fc(second[:1]).square().sum()


def collecting(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The module's outputs, and the gradients with respect to them, as they come."""
    outputs, slopes = [], []

    def hook(module, args, out):
        outputs.append(wide(out).flatten())
        if out.requires_grad:
            out.register_hook(lambda slope: slopes.append(wide(slope).flatten()))

    module.register_forward_hook(hook)
    return outputs, slopes


def test_a_module_that_runs_several_times_is_one_entry_with_merged_statistics():
    model, writer = Twice(), MemoryWriter()
    outputs, slopes = collecting(model.fc)
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(2):
            optimizer.zero_grad()
            model(batch(k)).backward()
            optimizer.step()
    for k in range(2):
        assert_moments(writer, "fc", torch.cat(outputs[3 * k : 3 * k + 3]), step=k + 1)
        slope = l2(*slopes[3 * k : 3 * k + 3])
        assert writer.value("activation_grad_norm/fc", k + 1) == pytest.approx(slope)


@pytest.mark.parametrize("sizes", [(5, 1, 3), (1,), (2, 7)])
def test_micro_batches_are_merged_exactly(sizes):
    model, writer = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), MemoryWriter()
    seen = {name: collecting(module) for name, module in model.named_children()}
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1, include="*"):
        for step in range(2):
            optimizer.zero_grad()
            for i, size in enumerate(sizes):
                (model(10 * i + batch(step, size)).square().mean() / len(sizes)).backward()
            optimizer.step()
    n = len(sizes)
    for name, (outputs, slopes) in seen.items():
        for step in range(2):
            assert_moments(writer, name, torch.cat(outputs[n * step : n * step + n]), step=step + 1)
            expected = l2(*slopes[n * step : n * step + n])
            assert writer.value(f"activation_grad_norm/{name}", step + 1) == pytest.approx(expected)


def test_gradients_of_activations_survive_in_place_relu():
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    model = copy.deepcopy(plain)
    model[1] = nn.ReLU(inplace=True)
    writers = [MemoryWriter(), MemoryWriter()]
    for each, writer in zip((plain, model), writers, strict=True):
        optimizer = sgd(each)
        with torchprobe.instrument(each, writer=writer, every=1, include="*"):
            each(batch()).square().mean().backward()
            optimizer.step()
    for name in "012":
        tag = f"activation_grad_norm/{name}"
        assert writers[1].value(tag) == pytest.approx(writers[0].value(tag), rel=1e-6)
        assert writers[1].value(f"activation_mean/{name}") == pytest.approx(writers[0].value(f"activation_mean/{name}"))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_part_counts_once(reentrant):
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            x = torch.utils.checkpoint.checkpoint(self[0], x, use_reentrant=reentrant)
            return self[1](x)

    plain = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    model = Checkpointed(*copy.deepcopy(plain))
    writers = [MemoryWriter(), MemoryWriter()]
    for each, writer in zip((plain, model), writers, strict=True):
        optimizer = sgd(each)
        with torchprobe.instrument(each, writer=writer, every=1) as session:
            for k in range(2):
                optimizer.zero_grad()
                each(batch(k).requires_grad_()).square().mean().backward()
                optimizer.step()
            assert session.step == 2
    for tag in writers[0].tags():
        if tag != "overview/probe_overhead" and writers[0].scalars(tag):
            assert writers[1].scalars(tag) == [(s, pytest.approx(v, rel=1e-5)) for s, v in writers[0].scalars(tag)], tag


# ---- train and eval


def test_dropout_and_batch_norm_show_what_each_mode_computes():
    model = nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64), nn.Dropout(0.5))
    writer, outputs = MemoryWriter(), {True: [], False: []}
    model[2].register_forward_hook(lambda module, args, out: outputs[module.training].append(out.detach()))
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1, include=["1", "2"]):
        model(batch()).square().mean().backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            model(batch(1))
    assert_moments(writer, "2", outputs[True][0])
    for key, value in moments(outputs[False][0]).items():
        assert writer.value(f"val/activation_{key}/2") == pytest.approx(value, rel=1e-6, abs=1e-12)
    assert writer.value("activation_zero_fraction/2") > 0.3 > writer.value("val/activation_zero_fraction/2")


# ---- which modules


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
