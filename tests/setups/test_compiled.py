"""Inside `torch.compile`, however it is called: no break, two graphs, and every value of an eager run."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import torchprobe
from tests.models import Transformer, inputs
from tests.setups.compiled import (
    COMPILERS_WARNINGS,
    NEEDS_GRADIENTS,
    OLDER,
    WAYS,
    Counting,
    Slim,
    Trained,
    assert_same_values,
    assert_same_weights,
    bare,
    each_block,
    forward,
    function,
    loss_of,
    method,
    train,
    twin,
    wrapper,
)
from tests.setups.matrix import SCALAR
from torchprobe.testing import MemoryWriter

pytestmark = [OLDER, *COMPILERS_WARNINGS]


@pytest.fixture(autouse=True)
def fresh_counters():
    counters.clear()


def made(layers: int = 1) -> Transformer:
    """A compiler takes seconds for each layer."""
    torch.manual_seed(0)
    return Transformer(dropout=0.0, layers=layers)


def slim(layers: int = 1) -> Slim:
    torch.manual_seed(0)
    return Slim(layers)


@functools.cache
def eager(make: Callable[[int], Transformer], layers: int = 1) -> Trained:
    return train(bare, model=make(layers))


@NEEDS_GRADIENTS
@pytest.mark.parametrize(("way", "layers"), [(way, 1 if way in (method, forward, function) else 2) for way in WAYS])
def test_each_way_of_compiling_gives_every_value_of_an_eager_run_from_two_graphs(way, layers):
    found, expected = train(way, model=made(layers)), eager(made, layers)
    assert_same_values(found.writer, expected.writer, output_inside=way is function)
    plain = 4 if way is function else 2  # there the second step, too, runs a sampled one
    expected_graphs = [1] * (plain - 1) + [2] * (8 - plain)
    assert found.graphs == expected_graphs, "one graph for sampled steps (1, 3, 6), one for the others"
    assert not counters["graph_break"]
    assert "not seen" not in found.summary
    assert_same_weights(found.model, expected.model)


@NEEDS_GRADIENTS
def test_instrument_may_come_after_compiling_and_take_its_result():
    found = train(wrapper, model=slim(), when="wrapped")
    assert_same_values(found.writer, eager(slim).writer)
    assert found.graphs[-1] == 2


@NEEDS_GRADIENTS
@pytest.mark.parametrize(("way", "layers"), [(wrapper, 1), (each_block, 2)])
def test_instrument_may_come_after_the_first_compiled_call_which_is_said_once(way, layers, caplog):
    found = train(way, model=slim(layers), when="late")
    assert_same_values(found.writer, eager(slim, layers).writer)
    assert found.graphs[-1] == 3
    said = [r.message for r in caplog.records if "compiled" in r.message]
    assert said == ["the model was compiled before torchprobe watched it; it is compiled once more, with probes"]


def test_a_compiled_function_that_was_called_before_is_noticed_after_one_step(caplog):
    found = train(function, model=slim(), when="late", every=1, steps=3)
    assert [s for s, _ in found.writer.scalars("attention_entropy/blocks.0.attention")] == [2, 3]
    assert [s for s, _ in found.writer.scalars("activation_mean/head")] == [2, 3]
    assert "compiled before torchprobe watched it" in caplog.text


@NEEDS_GRADIENTS
def test_behind_aot_autograd_values_are_those_of_eager_and_weights_bitwise_those_of_the_bare_compiled_run():
    found, plain = (train(wrapper, model=made(), backend="aot_eager", probed=probed) for probed in (True, False))
    assert_same_values(found.writer, twin(found, model=made()).writer)
    assert_same_weights(found.model, plain.model)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])  # the default one: matrix.py
def test_inductor_gives_the_values_of_eager_in_its_other_modes(mode):
    def way(model, **how):
        return torch.compile(model, mode=mode, **how)

    with torch._inductor.config.patch(SCALAR if mode == "reduce-overhead" else {}):
        found = train(way, model=slim(), steps=4, backend="inductor")
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert_same_values(found.writer, twin(found, model=slim()).writer)


@NEEDS_GRADIENTS
@pytest.mark.parametrize("probe", [torchprobe.Attention, torchprobe.Activations])
def test_a_single_probe_needs_no_more_graphs_and_may_come_late(probe, caplog):
    options = {"model": Slim(), "probes": [probe()], "every": 2, "steps": 4}
    expected = train(bare, **copy.deepcopy(options))
    found = train(wrapper, **copy.deepcopy(options))
    assert found.graphs == [1, 1, 2, 2]
    assert "compiled" not in caplog.text
    assert_same_values(found.writer, expected.writer)
    assert_same_values(train(wrapper, when="late", **options).writer, expected.writer)


def test_a_dozen_compiled_blocks_share_two_graphs_and_keep_their_own_values():
    def deep() -> Slim:
        torch.manual_seed(4)
        return Slim(layers=12, width=8)

    expected, found = train(bare, model=deep(), steps=4), train(each_block, model=deep(), steps=4)
    assert_same_values(found.writer, expected.writer)
    assert found.graphs[-1] == 2
    entropies = {tag: found.writer.scalars(tag)[0][1] for tag in found.writer.tags() if "attention_entropy/" in tag}
    assert len(set(entropies.values())) == 12


def test_probes_with_cadences_of_their_own_and_validation_need_no_further_graph():
    counting, model = Counting(), Slim()
    callee, optimizer = wrapper(model, backend=counting, fullgraph=True), torch.optim.SGD(model.parameters(), lr=0.1)
    writer = MemoryWriter()
    probes = [torchprobe.Activations(every=2), torchprobe.Attention(every=3), torchprobe.Gradients(every=5)]
    with torchprobe.instrument(model, writer=writer, probes=probes):
        for step in range(8):
            model.train()
            loss_of(callee, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                callee(inputs("transformer", seed=50))
    assert [s for s, _ in writer.scalars("activation_mean/head")] == [1, 2, 4, 6, 8]
    assert [s for s, _ in writer.scalars("attention_entropy/blocks.0.attention")] == [1, 3, 6]
    assert [s for s, _ in writer.scalars("val/activation_mean/head")] == [1, 2, 4, 6, 8]
    assert len(counting.graphs) == 4, "a sampled and a plain one, for training and for validation"


@NEEDS_GRADIENTS
def test_dynamic_shapes():
    model, counting = Slim(), Counting()
    twin, writers = copy.deepcopy(model), (MemoryWriter(), MemoryWriter())
    callee = torch.compile(model, backend=counting, fullgraph=True, dynamic=True)
    for callee_of, watched, writer in ((callee, model, writers[0]), (twin, twin, writers[1])):
        optimizer = torch.optim.SGD(watched.parameters(), lr=0.1)
        with torchprobe.instrument(watched, writer=writer, every=2):
            for n in range(6):
                ids = torch.arange((2 + n) * (5 + n)).reshape(2 + n, 5 + n) % 11
                F.cross_entropy(callee_of(ids).flatten(0, 1), ids.flatten()).backward()
                optimizer.step()
                optimizer.zero_grad()
    assert_same_values(*writers)
    assert len(counting.graphs) == 2


def test_a_compiled_step_of_the_optimizer_is_compiled_once_and_counted():
    model, counting, writer = Slim(), Counting(), MemoryWriter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = torch.compile(optimizer.step, backend=counting)
    with torchprobe.instrument(model, writer=writer, every=2) as session:
        graphs = []
        for n in range(5):
            loss_of(model, n).backward()
            step()
            optimizer.zero_grad()
            graphs.append(len(counting.graphs))
        assert session.step == 5
    assert graphs[0] == graphs[-1]
    assert [s for s, _ in writer.scalars("overview/grad_norm")] == [1, 2, 4]


def test_lbfgs_over_a_compiled_model():
    counting, writer, model = Counting(), MemoryWriter(), Slim()
    callee, optimizer = wrapper(model, backend=counting), torch.optim.LBFGS(model.parameters(), max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(callee, 1)
        loss.backward()
        return loss

    with torchprobe.instrument(model, writer=writer, every=2):
        for _ in range(4):
            optimizer.step(closure)
    assert [s for s, _ in writer.scalars("attention_entropy/blocks.0.attention")] == [1, 2, 4]
    assert len(counting.graphs) == 2


def test_outputs_may_be_changed_in_place():
    def trained(watched: bool) -> list[torch.Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        layers = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Dropout(0.1, inplace=True), nn.Linear(4, 2)
        model = nn.Sequential(*layers)
        session = torchprobe.instrument(model, writer=MemoryWriter(), every=1) if watched else None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        callee = torch.compile(model, backend="aot_eager", fullgraph=True)
        for _ in range(3):
            callee(torch.randn(3, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if session is not None:
            session.detach()
        return [parameter.detach() for parameter in model.parameters()]

    assert all(map(torch.equal, trained(True), trained(False)))
