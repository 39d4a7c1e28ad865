"""Inputs and surroundings in which attention is not recorded: the code runs as ever, and it is said once."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.capture.attention.harness import capture_of, hooked, record, recorded
from tests.capture.attention.passes import Lambda, depth, qkv, sdpa

# ---- unusual inputs


def ragged():
    return torch.nested.nested_tensor([torch.randn(3, 2, 4), torch.randn(5, 2, 4)], layout=torch.jagged).transpose(1, 2)


UNUSUAL = {
    "nested tensors": lambda: (lambda x: sdpa(x, x, x), ragged()),
    "torch.func transforms": lambda: (torch.vmap(lambda x: sdpa(x, x, x)), torch.randn(2, 3, 5, 4)),
    "sparse or meta tensors": lambda: (lambda x: sdpa(x, x, x), torch.randn(2, 3, 5, 4, device="meta")),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("reason", UNUSUAL)
def test_unusual_inputs_are_counted_and_told_once(reason, caplog):
    run, x = UNUSUAL[reason]()
    model = Lambda(run)
    capture = capture_of(model)
    with hooked(model, capture):
        outputs = [model(x), model(x)]
    assert outputs[0].shape == run(x).shape
    assert recorded(capture).heads == {}
    assert capture.uncovered == {reason: 2}
    assert [reason in line for line in caplog.messages] == [True]


def test_hand_written_attention_under_vmap_and_grad():
    def attend(x):
        return (x @ x.mT).softmax(-1) @ x

    x = torch.randn(2, 5, 4)
    seen = record(Lambda(torch.vmap(attend)), x)
    assert torch.equal(seen.output, torch.vmap(attend)(x))
    assert seen.uncovered == {"torch.func transforms": 1}
    gradient = torch.func.grad(lambda x: attend(x).sum())
    assert torch.equal(record(Lambda(gradient), x).output, gradient(x))


def test_fake_tensors():
    with FakeTensorMode() as mode:
        x = torch.randn(2, 3, 5, 4)
        seen = record(Lambda(lambda x: sdpa(x, x, x)), x)
    assert seen.output.fake_mode is mode
    assert seen.uncovered == {"tensors of type FakeTensor": 1}


class Tagged(torch.Tensor):
    """A tensor with something of the user's on it."""


def test_a_plain_subclass_is_seen_and_stays_what_it_is():
    x = torch.randn(2, 3, 5, 4).as_subclass(Tagged)
    seen = record(Lambda(lambda x: sdpa(x, x, x)), x)
    assert type(seen.output) is Tagged
    assert seen.heads == record(Lambda(lambda x: sdpa(x, x, x)), x.as_subclass(torch.Tensor)).heads


def test_multi_head_attention_of_a_subclass_stays_what_it_is():
    model, x = nn.MultiheadAttention(8, 2), torch.randn(5, 2, 8).as_subclass(Tagged)
    seen = record(model, x, x, x)
    assert type(seen.output[0]) is Tagged
    assert torch.equal(seen.output[0], model(x, x, x)[0])
    assert seen.uncovered == {"multi-head attention of tensor subclasses": 1}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing_is_not_entered():
    model = Lambda(lambda x: sdpa(x, x, x))
    capture = capture_of(model)
    with hooked(model, capture):
        traced = torch.jit.trace(model, torch.randn(2, 3, 5, 4), check_trace=False)
    x = torch.randn(2, 3, 5, 4)
    assert torch.equal(traced(x), model(x))
    assert recorded(capture).heads == {}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_parts_are_said_not_to_be_covered_and_the_others_are():
    scripted = torch.jit.trace(Lambda(lambda x: sdpa(x, x, x)), torch.randn(2, 3, 5, 4), check_trace=False)
    model, x = nn.Sequential(scripted, Lambda(lambda x: sdpa(x, x, x))), qkv()[0]
    seen = record(model, x)
    assert torch.equal(seen.output, model(x))
    assert list(seen.heads) == ["1"]
    assert seen.uncovered == {"parts of the model that torch.jit has compiled": 1}


def test_export_is_not_entered():
    model = Lambda(lambda x: sdpa(x, x, x))
    capture = capture_of(model)
    with hooked(model, capture):
        program = torch.export.export(model, (torch.randn(2, 3, 5, 4),), strict=False)
    x = torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(program.module()(x), model(x))
    assert recorded(capture).heads == {}
    assert depth() == 0


def test_a_compiled_function_in_the_forward_pass_is_compiled_once_more_and_no_more():
    torch._dynamo.reset()
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(lambda x: sdpa(x, x, x), backend=backend, fullgraph=True)
    model, x = Lambda(lambda x: compiled(x) + sdpa(x, x, x)), torch.randn(2, 3, 5, 4)
    expected = model(x)
    capture = capture_of(model)
    for _ in range(3):
        with hooked(model, capture):
            assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
    assert len(graphs) == 2
    assert "root" in recorded(capture).heads
    torch._dynamo.reset()


def test_operations_of_a_compiled_graph_that_runs_one_by_one_are_not_taken_for_the_users():
    part = Lambda(lambda x: sdpa(x, x, x))
    model, x = nn.Sequential(torch.compile(part, backend="eager")), torch.randn(2, 3, 5, 4)
    seen = record(model, x)
    assert torch.equal(seen.output, part(x))
    assert (seen.heads, seen.uncovered) == ({}, {})
    torch._dynamo.reset()


def test_a_pass_that_is_captured_into_a_cuda_graph_is_not_entered(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    seen = record(Lambda(lambda x: sdpa(x, x, x)), qkv()[0])
    assert seen.uncovered == {"passes that are captured into a CUDA graph": 1}


def test_a_second_thread_runs_the_model_unrecorded_and_is_counted():
    inside, done = threading.Event(), threading.Event()

    def run(x):
        if threading.current_thread() is threading.main_thread():
            inside.set()
            assert done.wait(20)
        return sdpa(x, x, x)

    model, x = Lambda(run), qkv()[0]
    capture = capture_of(model)
    outputs = []

    def other():
        inside.wait(20)
        outputs.append(model(x))
        outputs.append(depth())
        done.set()

    thread = threading.Thread(target=other)
    with hooked(model, capture):
        thread.start()
        outputs.append(model(x))
        thread.join()
    assert torch.equal(outputs[0], outputs[2])
    assert outputs[1] == 0
    assert recorded(capture).of("rows") == [10] * 3
    assert capture.uncovered == {"a forward pass beside another one, in a second thread": 1}


def test_attention_in_a_thread_of_the_forward_pass_runs_as_ever():
    def run(x):
        result = []
        thread = threading.Thread(target=lambda: result.append(sdpa(x, x, x)))
        thread.start()
        thread.join()
        return result[0]

    x = qkv()[0]
    seen = record(Lambda(run), x)
    assert torch.equal(seen.output, sdpa(x, x, x))
    assert seen.heads == {}


def test_lazy_parameters_do_not_end_the_probe():
    """The first pass gives them their shapes, by calls with what has none yet."""
    model = nn.Sequential(nn.LazyLinear(4), Lambda(lambda x: sdpa(x, x, x)))
    x = torch.randn(2, 3, 5, 4)
    first, second = record(model, x), record(model, x)
    assert first.heads.keys() == second.heads.keys() == {"1"}
    torch.testing.assert_close(first.heads["1"], second.heads["1"])
