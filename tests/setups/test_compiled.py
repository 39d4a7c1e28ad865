"""Inside `torch.compile`, however it is called: no break, two graphs, and every value of an eager run."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import torchprobe
from tests.models import Transformer, inputs
from tests.setups.compiled import (
    COMPILERS_WARNINGS,
    WAYS,
    Counting,
    assert_same_values,
    assert_same_weights,
    bare,
    each_block,
    function,
    loss_of,
    method,
    train,
    wrapper,
)
from torchprobe.capture.attention import dot_product
from torchprobe.capture.tracing import TRACES_GRADIENT_HOOKS
from torchprobe.testing import MemoryWriter

pytestmark = [
    # What is promised there is tested in test_compiled_older.py.
    pytest.mark.skipif(not TRACES_GRADIENT_HOOKS, reason="graphs of this torch take no hooks of tensors inside them"),
    *COMPILERS_WARNINGS,
]


@pytest.fixture(autouse=True)
def fresh_counters():
    counters.clear()


@pytest.fixture(scope="module")
def eager():
    torch.manual_seed(0)
    return train(bare)


@pytest.mark.parametrize("way", WAYS)
def test_each_way_of_compiling_gives_every_value_of_an_eager_run_from_two_graphs(way, eager):
    found = train(way)
    assert_same_values(found.writer, eager.writer, output_inside=way is function)
    assert found.graphs == [1, 2, 2, 2, 2, 2, 2], "one graph for sampled steps (1, 3, 6), one for the others"
    assert not counters["graph_break"]
    assert "not seen" not in found.summary
    assert_same_weights(found.model, eager.model)


def test_instrument_may_come_after_compiling_and_take_its_result(eager):
    found = train(wrapper, when="wrapped")
    assert_same_values(found.writer, eager.writer)
    assert found.graphs[-1] == 2


@pytest.mark.parametrize("way", [wrapper, each_block])
def test_instrument_may_come_after_the_first_compiled_call_which_is_said_once(way, eager, caplog):
    found = train(way, when="late")
    assert_same_values(found.writer, eager.writer)
    assert found.graphs[-1] == 3
    said = [r.message for r in caplog.records if "compiled" in r.message]
    assert said == ["the model was compiled before torchprobe watched it; it is compiled once more, with probes"]


def test_a_compiled_function_that_was_called_before_is_noticed_after_one_step(caplog):
    found = train(function, when="late", every=1, steps=3)
    assert [s for s, _ in found.writer.scalars("attention_entropy/blocks.0.attention")] == [2, 3]
    assert [s for s, _ in found.writer.scalars("activation_mean/head")] == [2, 3]
    assert "compiled before torchprobe watched it" in caplog.text


def test_behind_aot_autograd_values_are_those_of_eager_and_weights_bitwise_those_of_the_bare_compiled_run(eager):
    found, plain = train(wrapper, backend="aot_eager"), train(wrapper, backend="aot_eager", probed=False)
    assert_same_values(found.writer, eager.writer)
    assert_same_weights(found.model, plain.model)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_inductor_gives_the_values_of_eager_in_each_mode(mode):
    def way(model, **how):
        return torch.compile(model, mode=mode, **how)

    def shallow() -> Transformer:
        torch.manual_seed(4)
        return Transformer(dropout=0.0, layers=1)

    expected = train(bare, model=shallow(), steps=4)
    counters.clear()
    found = train(way, model=shallow(), steps=4, backend="inductor")
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert_same_values(found.writer, expected.writer)


@pytest.mark.parametrize("probe", [torchprobe.Attention, torchprobe.Activations])
def test_a_single_probe_needs_no_more_graphs_and_may_come_late(probe, caplog):
    options = {"model": Transformer(dropout=0.0, layers=1), "probes": [probe()], "every": 2, "steps": 4}
    expected = train(bare, **copy.deepcopy(options))
    found = train(wrapper, **copy.deepcopy(options))
    assert found.graphs == [1, 1, 2, 2]
    assert "compiled" not in caplog.text
    assert_same_values(found.writer, expected.writer)
    assert_same_values(train(wrapper, when="late", **options).writer, expected.writer)


def test_a_dozen_compiled_blocks_share_two_graphs_and_keep_their_own_values():
    def deep() -> Transformer:
        torch.manual_seed(4)
        return Transformer(dropout=0.0, layers=12, width=8)

    expected, found = train(bare, model=deep(), steps=4), train(each_block, model=deep(), steps=4)
    assert_same_values(found.writer, expected.writer)
    assert found.graphs[-1] == 2
    entropies = {tag: found.writer.scalars(tag)[0][1] for tag in found.writer.tags() if "attention_entropy/" in tag}
    assert len(set(entropies.values())) == 12


def test_probes_with_cadences_of_their_own_and_validation_need_no_further_graph():
    counting, model = Counting(), Transformer(dropout=0.0, layers=1)
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


def test_dynamic_shapes():
    model, counting = Transformer(dropout=0.0, layers=1), Counting()
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
    model, counting, writer = Transformer(dropout=0.0, layers=1), Counting(), MemoryWriter()
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
    counting, writer, model = Counting(), MemoryWriter(), Transformer(dropout=0.0, layers=1)
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


def test_multi_head_attention_and_padding_in_a_compiled_model():
    def passes(compiled: bool) -> MemoryWriter:
        torch.manual_seed(2)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        model, writer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), MemoryWriter()
        if compiled:
            model.compile(backend="eager", fullgraph=True)
        padding = torch.tensor([[False] * 5, [False, False, False, True, True]])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torchprobe.instrument(model, writer=writer, every=1):
            for step in range(2):
                x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(step))
                model(x, src_key_padding_mask=padding)[~padding].square().mean().backward()
                optimizer.step()
        return writer

    expected = passes(compiled=False)
    assert "attention_entropy/layers.1.self_attn" in expected.tags()
    assert_same_values(passes(compiled=True), expected)


def masks(name: str, queries: int) -> dict[str, torch.Tensor]:
    """Of 2 sequences and 4 keys."""
    padding = torch.tensor([[False] * 4, [False, False, True, True]])
    forbidden = torch.triu(torch.ones(queries, 4, dtype=torch.bool), 1)
    return {"none": {}, "padding": {"key_padding_mask": padding}, "mask": {"attn_mask": forbidden}}[name]


@pytest.mark.parametrize(
    ("options", "masked", "batched", "queries"),
    [
        ({"add_bias_kv": True}, "padding", True, 4),
        ({"add_zero_attn": True}, "padding", True, 5),  # as many as there are keys with the added one
        ({"add_bias_kv": True, "add_zero_attn": True}, "mask", True, 3),
        ({"add_bias_kv": True, "add_zero_attn": True}, "padding", False, 4),
    ],
)
def test_keys_that_multi_head_attention_adds_count_in_compiled_models_too(options, masked, batched, queries):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

        def forward(self, q, k):
            given = masks(masked, queries)
            if batched:
                return self.attention(q, k, k, **given)[0]
            given = {name: mask[1] if name == "key_padding_mask" else mask for name, mask in given.items()}
            return self.attention(q[0], k[0], k[0], **given)[0]

    def passes(compiled: bool) -> MemoryWriter:
        torch.manual_seed(2)
        model, writer = Model(), MemoryWriter()
        run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        with torchprobe.instrument(model, writer=writer, probes=[torchprobe.Attention(every=1)]):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for step in range(2):
                generator = torch.Generator().manual_seed(step)
                k = torch.randn(2, 4, 8, generator=generator)
                q = k if queries == 4 else torch.randn(2, queries, 8, generator=generator)
                run(q, k).square().mean().backward()
                optimizer.step()
        return writer

    expected = passes(compiled=False)
    assert "attention_entropy/attention" in expected.tags()
    assert_same_values(passes(compiled=True), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_shapes_of_no_known_form_are_told_of_and_the_others_go_on(compiled, monkeypatch):
    query_key = dot_product.query_key

    def of_few(call, heads):
        if call["query"].dim() == 3:
            raise ValueError("mask: got another shape")
        return query_key(call, heads)

    monkeypatch.setattr(dot_product, "query_key", of_few)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            unknown = F.scaled_dot_product_attention(x, x, x * self.scale)[None]
            return F.scaled_dot_product_attention(unknown, unknown, unknown)

    torch.manual_seed(2)
    model, writer = Attention(), MemoryWriter()
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, probes=[torchprobe.Attention(every=1)]) as session:
        run(torch.randn(3, 5, 4)).square().mean().backward()
        optimizer.step()
        session.flush()
        assert "calls in root, whose shapes are of no known form" in str(session.summary())
    assert len(writer.scalars("attention_entropy/root")) == 1


@pytest.mark.parametrize("way", [wrapper, function])
def test_a_probe_of_the_users_that_cannot_be_traced_or_fails_does_no_harm(way, caplog):
    class Largest(torchprobe.Probe):
        source = "outputs"
        fields = ("largest",)

        def compute(self, tensor):
            if tensor.sum().item() == -1 or tensor.size(-1) == 48:
                raise RuntimeError("it cannot")
            return tensor.max().reshape(1)

        def report(self, name, values):
            yield f"largest/{name}", values["largest"]

    found = train(way, probes=[Largest()], include=["head"], steps=4)
    expected = train(bare, probes=[Largest()], include=["head"], steps=4)
    assert found.writer.scalars("largest/head") == expected.writer.scalars("largest/head") != []
    assert found.graphs[-1] == 2
    failing = train(way, probes=[Largest()], steps=4)
    assert "it cannot" in caplog.text
    assert_same_weights(failing.model, expected.model)


def test_after_detach_the_graphs_are_the_plain_ones(traces):
    model, counting = Transformer(dropout=0.0, layers=1), Counting()
    callee = wrapper(model, backend=counting)
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1):
        for n in range(2):
            loss_of(callee, n).backward()
    assert not traces(model)
    loss_of(callee, 3)
    torch._dynamo.reset()
    loss_of(callee, 3)
    *_, after, plain = counting.graphs
    assert after.code == plain.code


@torch._dynamo.config.patch(recompile_limit=4)
def test_sessions_may_follow_each_other_on_one_compiled_model(caplog):
    model, counting, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), Counting(), torch.randn(5, 3)
    callee, optimizer = wrapper(model, backend=counting), torch.optim.SGD(model.parameters(), lr=0.1)
    rounds = torch._dynamo.config.recompile_limit + 2
    for n in range(rounds):
        writer = MemoryWriter()
        with torchprobe.instrument(model, writer=writer, every=3):
            for _ in range(3):
                callee(x).square().mean().backward()
                optimizer.step()
        assert [s for s, _ in writer.scalars("activation_mean/2")] == [1, 3], n
        callee(x)
    assert "recompile_limit" not in caplog.text
    assert len(counting.graphs) <= 3 * rounds


def test_a_compiled_model_hears_of_no_process_wide_hook(recwarn):
    model, criterion = Transformer(dropout=0.0, layers=1), nn.CrossEntropyLoss()
    callee, optimizer = wrapper(model, backend="eager"), torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1):
        for ids in (inputs("transformer", seed=1), inputs("transformer", seed=2)):
            passes = [callee(ids), callee(ids)]
            sum(criterion(output.flatten(0, 1), ids.flatten()) for output in passes).backward()
            optimizer.step()
            model.eval()
            criterion(callee(ids).flatten(0, 1), ids.flatten())
            model.train()
    assert not [warning for warning in recwarn if "global hooks" in str(warning.message)]


def test_a_copy_of_a_compiled_and_instrumented_model_is_neither(traces):
    model = Transformer(dropout=0.0, layers=1)
    callee, writer = method(model, backend="eager"), MemoryWriter()
    with torchprobe.instrument(model, writer=writer, every=1):
        loss_of(callee, 1).backward()
        twin = copy.deepcopy(model)
        assert torchprobe.session_of(twin) is None
        assert torch.equal(twin(inputs("transformer")), model(inputs("transformer")))


def test_an_exception_in_a_compiled_pass_reaches_the_user_and_leaves_nothing_entered():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Transformer(dropout=0.0, layers=1)

        def forward(self, ids, width):
            return self.inner(ids) @ torch.ones(width, 1)

    model, writer = Breaks(), MemoryWriter()
    callee, optimizer = wrapper(model, backend="eager"), torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for width in (11, 12, 11):
            with pytest.raises(Exception, match="reduction dim") if width == 12 else nullcontext():
                callee(inputs("transformer"), width).mean().backward()
                optimizer.step()
            assert torch._C._len_torch_function_stack() == 0
        assert session.step == 2
    assert [s for s, _ in writer.scalars("attention_entropy/inner.blocks.0.attention")] == [1, 2]


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_an_instrumented_model_gives_the_plain_program(strict):
    model, ids = Transformer(dropout=0.0, layers=1), inputs("transformer")
    plain = torch.export.export(model, (ids,), strict=strict)
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1):
        watched = torch.export.export(model, (ids,), strict=strict)
        assert torch.equal(watched.module()(ids), model(ids))
    assert watched.graph_module.code == plain.graph_module.code


def test_functional_call_and_inference_mode_with_a_compiled_model():
    model = Transformer(dropout=0.0, layers=1)
    callee, ids = wrapper(model, backend="eager", fullgraph=True), inputs("transformer")
    expected, halves = model(ids).detach(), {name: p.detach() / 2 for name, p in model.named_parameters()}
    expected_half = torch.func.functional_call(model, halves, (ids,)).detach()
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1):
        with torch.inference_mode():
            assert torch.equal(callee(ids), expected)
        assert torch.equal(torch.func.functional_call(model, halves, (ids,)), expected_half)
        assert torch.equal(callee(ids), expected)


def test_transforms_of_torch_func_inside_a_compiled_function():
    model, ids = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), torch.randn(4, 3)

    def per_sample(ids):
        return torch.vmap(torch.func.grad(lambda row: model(row).sum()))(ids)

    expected = per_sample(ids)
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1):
        found = torch.compile(per_sample, backend="eager", fullgraph=True)(ids)
    assert torch.allclose(found, expected)
