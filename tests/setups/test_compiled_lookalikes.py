"""Models of one class in one process, which share Dynamo's graphs: each is recorded as if it were alone."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import dataclass, field
from types import CodeType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.convert_frame import _bytecode_hooks
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

import torchprobe
from tests.models import Transformer, inputs
from tests.setups.compiled import (
    COMPILERS_WARNINGS,
    NEEDS_GRADIENTS,
    OLDER,
    Callee,
    Counting,
    Slim,
    assert_same_values,
    assert_same_weights,
    bare,
    each_block,
    function,
    loss_of,
    wrapper,
)
from torchprobe.capture.compiled.graphs import GraphGuards
from torchprobe.testing import MemoryWriter

pytestmark = [OLDER, *COMPILERS_WARNINGS]


@dataclass
class Pair:
    """Two equal models, trained in turn on data of their own."""

    models: list[Transformer]
    writers: list[MemoryWriter]
    counting: Counting
    graphs: list[int] = field(default_factory=list)
    """How many there were after each step."""


def train_in_turn(way, *, make=Slim, order=(0, 1), watched=(0,), detach_after=None, steps=4, **options) -> Pair:
    torch.manual_seed(0)
    model, counting = make(), Counting()
    pair = Pair([model, copy.deepcopy(model)], [MemoryWriter(), MemoryWriter()], counting)
    callees = [way(model, backend=counting, fullgraph=True) for model in pair.models]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in pair.models]
    sessions = {
        at: torchprobe.instrument(pair.models[at], writer=pair.writers[at], every=3, **options) for at in watched
    }
    for step in range(1, steps + 1):
        for at in order:
            loss_of(callees[at], step + 100 * at).backward()
            optimizers[at].step()
            optimizers[at].zero_grad()
        pair.graphs.append(len(counting.graphs))
        if step == detach_after:
            sessions.pop(watched[0]).detach()
    for session in sessions.values():
        session.detach()
    return pair


def assert_same(found: Pair, expected: Pair, output_inside: bool = False) -> None:
    for at in (0, 1):
        assert_same_values(found.writers[at], expected.writers[at], output_inside)
        assert_same_weights(found.models[at], expected.models[at])


@NEEDS_GRADIENTS
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["watched first", "watched second"])
@pytest.mark.parametrize("way", [wrapper, each_block, function])
def test_one_of_two_models_is_watched(way, order, caplog):
    found = train_in_turn(way, order=order)
    assert_same(found, train_in_turn(bare, order=order), output_inside=way is function)
    assert found.writers[0].scalars("attention_entropy/blocks.0.attention")
    assert not found.writers[1].tags()
    plain = 4 if way is function else 2  # the second step tells whether optimizers have passes of their own
    assert found.graphs == [3 if step >= plain else 2 for step in (1, 2, 3, 4)], "sampled, plain, and the other model's"
    assert "compiled" not in caplog.text


@pytest.mark.parametrize(
    ("way", "probe"),
    [(wrapper, torchprobe.Attention), (function, torchprobe.Attention), (function, torchprobe.Gradients)],
)
def test_one_of_two_models_is_watched_by_a_single_probe(way, probe):
    found = train_in_turn(way, order=(1, 0), probes=[probe()])
    assert_same(found, train_in_turn(bare, order=(1, 0), probes=[probe()]), output_inside=way is function)
    assert found.writers[0].tags()


@NEEDS_GRADIENTS
@pytest.mark.parametrize("way", [wrapper, function])
def test_both_are_watched_and_the_sessions_keep_apart(way):
    found = train_in_turn(way, watched=(0, 1))
    assert_same(found, train_in_turn(bare, watched=(0, 1)), output_inside=way is function)
    if way is wrapper:
        assert found.graphs[-1] == 2, "equal models share graphs, and each has its own numbers"


@pytest.mark.parametrize("watched", [(0,), (0, 1), (1, 0)])
def test_one_session_ends_and_the_models_train_on(watched):
    found = train_in_turn(wrapper, watched=watched, detach_after=2)
    assert_same(found, train_in_turn(bare, watched=watched, detach_after=2))
    assert found.graphs[-1] == 3


@pytest.mark.parametrize("watched", ["teacher", "student"])
def test_a_teacher_and_its_student(watched):
    def distil(way) -> tuple[MemoryWriter, Transformer]:
        torch.manual_seed(0)
        teacher, writer, counting = Slim(), MemoryWriter(), Counting()
        student = copy.deepcopy(teacher)
        callees: list[Callee] = [way(model, backend=counting, fullgraph=True) for model in (teacher, student)]
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        with torchprobe.instrument(student if watched == "student" else teacher, writer=writer, every=2):
            for step in range(3):
                ids = inputs("transformer", seed=step)
                with torch.no_grad():
                    target = callees[0](ids).softmax(-1)
                F.cross_entropy(callees[1](ids).flatten(0, 1), target.flatten(0, 1)).backward()
                optimizer.step()
                optimizer.zero_grad()
        return writer, student

    (found, student), (expected, twin) = distil(wrapper), distil(bare)
    assert_same_weights(student, twin)
    if watched == "student":
        assert_same_values(found, expected)


def deep() -> Transformer:
    return Transformer(dropout=0.0, layers=2)


def test_blocks_that_are_not_to_be_watched_do_not_lend_their_graph_to_one_that_is():
    options = {"make": deep, "include": ["blocks.1*"], "watched": (0,), "order": (0,)}
    found = train_in_turn(each_block, **options)
    assert_same(found, train_in_turn(bare, **options))
    assert [s for s, _ in found.writers[0].scalars("activation_mean/blocks.1.mlp.0")] == [1, 3]


def test_graphs_of_other_classes_get_no_guard_and_detach_takes_the_compilers_hook_off():
    before = len(_bytecode_hooks)
    model, other = Slim(), Named()
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1):
        torch.compile(other, backend="eager")(torch.ones(2))
        torch.compile(copy.deepcopy(model), backend="eager")(inputs("transformer"))
        guards = {code: str(_guards(code)) for code in (Transformer.forward.__code__, Named.forward.__code__)}
    assert "_torchprobe" in guards.pop(Transformer.forward.__code__)
    assert "_torchprobe" not in guards.popitem()[1]
    assert len(_bytecode_hooks) == before


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def _guards(code: CodeType) -> str:
    (entry,) = _debug_get_cache_entry_list(code)
    return str(entry.guard_manager)


def test_a_guard_that_cannot_be_made_is_said_once_and_stops_no_compiler(monkeypatch, caplog):
    def fail(self):
        raise RuntimeError("another Dynamo")

    monkeypatch.setattr(GraphGuards, "_guard", fail)
    model = Slim()
    compiled = torch.compile(model, backend="eager")
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1, probes=[torchprobe.Activations()]):
        for seed in range(2):
            loss_of(compiled, seed).backward()
            compiled(inputs("transformer", seed=seed)[:, :3])  # another shape, another graph
    assert caplog.text.count("compiled graphs are not guarded") == 1


@pytest.mark.parametrize("other", [nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.LayerNorm(3)])
def test_an_eager_model_of_torchs_own_class_is_not_called_compiled_and_leaves_other_graphs_alone(other, caplog):
    counting, model, writer = Counting(), nn.Sequential(nn.Linear(3, 3), nn.Tanh()), MemoryWriter()
    compiled, optimizer = torch.compile(other, backend=counting), torch.optim.SGD(model.parameters(), lr=0.1)
    compiled(torch.ones(2, 3))
    with torchprobe.instrument(model, writer=writer, every=1):
        for _ in range(3):
            model(torch.ones(2, 3)).square().mean().backward()
            optimizer.step()
            compiled(torch.ones(2, 3))
    assert len(counting.graphs) == 1
    assert "compiled before" not in caplog.text
    assert [s for s, _ in writer.scalars("activation_mean/0")] == [1, 2, 3]


def test_a_compiler_that_comes_after_instrument_still_guards_its_first_graph():
    script = """
import sys, torch, torchprobe
from torch import nn
from torchprobe.capture.compiled.graphs import GraphGuards
model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
guards = GraphGuards(lambda: model, {})
assert "torch._dynamo" not in sys.modules, "nothing of Dynamo is loaded for an eager model"
compiled = torch.compile(model, backend="eager")
guards.attach()
compiled(torch.ones(2, 3))
print(len(guards.unguarded))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert ran.stdout.split() == ["1"], ran.stderr
