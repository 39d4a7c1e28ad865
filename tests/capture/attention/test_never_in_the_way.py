"""Whatever the user does around and inside the forward pass goes on as if nobody looked."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as nn_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.capture.attention.harness import capture_of, hooked, record, recorded
from tests.models import Transformer
from torchprobe.capture.attention import observer, reading

sdpa = F.scaled_dot_product_attention


def depth() -> int:
    return torch._C._len_torch_function_stack()


class Lambda(nn.Module):
    def __init__(self, run) -> None:
        super().__init__()
        self.run = run

    def forward(self, *args):
        return self.run(*args)


def qkv():
    return torch.randn(3, 2, 3, 5, 4).unbind(0)


# ---- exceptions


def test_an_exception_in_the_forward_pass_leaves_nothing():
    def fail(x):
        sdpa(x, x, x)
        raise KeyError("mine")

    model = Lambda(fail)
    capture = capture_of(model)
    with hooked(model, capture), pytest.raises(KeyError, match="mine"):
        model(qkv()[0])
    assert depth() == 0
    assert nn_module._global_forward_pre_hooks == {}


def test_an_interrupted_pass_is_cleared_up_by_the_next_one():
    def interrupted(x, stop):
        if stop:
            raise KeyboardInterrupt
        return sdpa(x, x, x)

    model = Lambda(interrupted)
    capture = capture_of(model)
    with hooked(model, capture):
        with pytest.raises(KeyboardInterrupt):
            model(qkv()[0], True)
        assert depth() == 1
        model(qkv()[0], False)
    assert depth() == 0
    assert recorded(capture).of("rows") == [10] * 3


def test_leaving_twice_and_without_entering_does_nothing():
    model = Lambda(None)
    capture = capture_of(model)
    capture.leave()
    capture.enter(model)
    capture.leave()
    capture.leave()
    assert depth() == 0


def test_an_error_in_the_statistic_ends_the_probe_and_not_the_training(monkeypatch, caplog):
    monkeypatch.setattr(reading, "compute", lambda *args: 1 / 0)
    model = Lambda(sdpa)
    capture = capture_of(model)
    q, k, v = qkv()
    with hooked(model, capture):
        assert torch.equal(model(q, k, v), sdpa(q, k, v))
        assert torch.equal(model(q, k, v), sdpa(q, k, v))
    assert recorded(capture).heads == {}
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "ZeroDivisionError" in caplog.text


# ---- the user's modes


class Naming(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


def attention_with_mode_inside(mode):
    def run(x):
        with mode:
            y = sdpa(x, x, x)
        return y + (x @ x.mT).softmax(-1) @ x

    return Lambda(run)


def test_a_mode_inside_the_forward_pass_sees_its_calls_and_so_do_we():
    mode, bare = Naming(), Naming()
    x = qkv()[0]
    attention_with_mode_inside(bare)(x)
    seen = record(attention_with_mode_inside(mode), x)
    assert mode.calls == bare.calls
    assert list(seen.heads) == ["root", "root/2"]


def test_a_mode_around_the_forward_pass_sees_nothing_of_ours():
    model, ids = Transformer(dropout=0.0), torch.randint(0, 11, (3, 7))
    capture = capture_of(model)
    with Naming() as bare:
        expected = model(ids)
    with hooked(model, capture), Naming() as mode:
        output = model(ids)
    assert mode.calls == bare.calls
    assert torch.equal(output, expected)
    assert len(recorded(capture).heads) == 2


def test_a_mode_that_changes_results_still_does():
    class Doubling(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            return result * 2 if func is sdpa else result

    q, k, v = qkv()
    with Doubling():
        seen = record(Lambda(sdpa), q, k, v)
    assert torch.equal(seen.output, 2 * sdpa(q, k, v))
    assert list(seen.heads) == ["root"]


def test_default_devices_inside_and_around():
    def run(x):
        with torch.device("meta"):
            assert torch.empty(1).device.type == "meta"
            y = sdpa(x, x, x)
        with torch.device("cpu"):
            return y + torch.zeros(1)

    with torch.device("meta"):
        seen = record(Lambda(run), torch.randn(2, 3, 5, 4, device="cpu"))
        assert torch.empty(1).device.type == "meta"
        assert depth() == 1
    assert list(seen.heads) == ["root"]
    assert torch.empty(1).device.type == "cpu"


def test_a_mode_that_the_forward_pass_leaves_entered_stays():
    mode = Naming()

    def run(x):
        mode.__enter__()
        return sdpa(x, x, x)

    model = Lambda(run)
    capture = capture_of(model)
    with hooked(model, capture):
        model(qkv()[0])
    assert depth() == 1
    mode.__exit__(None, None, None)
    assert recorded(capture).of("rows") == [10] * 3


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_see_nothing_of_ours():
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x, padding = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    capture = capture_of(model)
    with Operations() as bare:
        model(x, src_key_padding_mask=padding)
    with hooked(model, capture), Operations() as mode:
        model(x, src_key_padding_mask=padding)
    with hooked(model, capture), FlopCounterMode(display=False) as counter:
        model(x)
    assert mode.names == bare.names
    with FlopCounterMode(display=False) as uncounted:
        model(x)
    assert counter.get_total_flops() == uncounted.get_total_flops()
    assert recorded(capture).of("rows", "self_attn") == [20, 20]


def test_nothing_is_read_back_from_the_device(monkeypatch):
    """What would make a GPU wait: seen by a dispatch mode that is not hidden from."""

    monkeypatch.setattr(observer, "_disable_current_modes", nullcontext)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()

    def run(x):
        y = sdpa(x, x, x, mask)
        scores = (y @ y.mT).masked_fill(~mask, -torch.inf)
        scores = torch.cat([scores, torch.zeros(2, 3, 5, 1)], -1)
        return (scores - scores.amax(-1, True)).softmax(-1)[..., :-1] @ y

    model = Lambda(run)
    capture = capture_of(model, rows=4)
    with hooked(model, capture), Operations() as mode:
        model(qkv()[0])
    assert len(recorded(capture).heads) == 2
    reads = ("_local_scalar_dense", "nonzero", "item", "unique", "masked_select", "equal.default")
    assert [name for name in mode.names if any(read in name for read in reads)] == []


# ---- precision, gradients and inference


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    q, k, v = qkv()
    model = Lambda(sdpa)
    capture = capture_of(model)
    with mode(), hooked(model, capture):
        output = model(q, k, v)
        model(q, k, v)
    assert torch.equal(output, sdpa(q, k, v))
    found = capture.collect()
    assert not found[0].rows.is_inference()
    assert not found[0].rows.requires_grad


def test_statistics_are_in_full_precision_inside_autocast():
    q, k, v = (x * 3 for x in qkv())
    exact = record(Lambda(sdpa), q, k, v).heads
    with torch.autocast("cpu", torch.bfloat16):
        assert record(Lambda(sdpa), q, k, v).heads == exact


def test_saved_tensor_hooks_see_nothing_of_ours():
    packed = []
    q, k, v = (x.requires_grad_() for x in qkv())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        sdpa(q, k, v)
        bare = list(packed)
        packed.clear()
        record(Lambda(sdpa), q, k, v)
    assert packed == bare


def test_the_global_generator_stays():
    model, x = Lambda(lambda x: sdpa(x, x, x)), torch.randn(64, 2, 20, 4)
    before = torch.get_rng_state()
    seen = record(model, x, rows=16)
    assert seen.sampled == {"root": True}
    assert torch.equal(torch.get_rng_state(), before)


# ---- evaluation


def encoder() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fused_path_of_an_encoder_in_evaluation_is_kept():
    model = encoder().eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        seen = record(model, x, src_key_padding_mask=padding)
    assert torch.equal(seen.output, expected)
    assert seen.uncovered == {"the fused path of nn.TransformerEncoder in evaluation": 1}
    assert nn_module._global_forward_pre_hooks == {}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_frozen_encoder_inside_a_model_in_training_keeps_its_fused_path():
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text = encoder().requires_grad_(False).eval()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x, padding):
            with torch.no_grad():
                memory = self.text(x, src_key_padding_mask=padding)
            return self.attention(x[:, :3], memory, memory)[0], memory

    model, x = Frozen(), torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = model(x, padding)
    seen = record(model, x, padding)
    assert all(torch.equal(a, b) for a, b in zip(seen.output, expected, strict=True))
    assert list(seen.heads) == ["attention"]


def test_the_fused_path_of_multi_head_attention_is_kept_and_cross_attention_is_seen():
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True).eval()
    x, y = torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    with torch.no_grad():
        expected = model(x, y)
        seen = record(model, x, y)
    assert torch.equal(seen.output, expected)
    assert list(seen.heads) == ["decoder.layers.0.multihead_attn"]


def test_an_exception_in_a_fused_module_leaves_no_hook():
    model = nn.Sequential(encoder()).eval()
    capture = capture_of(model)
    with torch.no_grad(), hooked(model, capture), pytest.raises(RuntimeError, match="embed_dim"):
        model(torch.randn(2, 5, 7))
    assert depth() == 0
    assert nn_module._global_forward_pre_hooks == {}


def test_evaluation_with_gradients_has_no_fused_path_and_is_seen():
    model = encoder().eval()
    seen = record(model, torch.randn(2, 5, 8))
    assert list(seen.heads) == ["layers.0.self_attn", "layers.1.self_attn"]


def test_a_session_that_enters_without_gradients_says_how_the_pass_runs():
    model = nn.Sequential(encoder()).eval()
    capture = capture_of(model)
    with torch.no_grad():
        capture.enter(model[0], grad_enabled=True)
    model[0](torch.randn(2, 5, 8))
    capture.leave()
    assert list(recorded(capture).heads) == ["0.layers.0.self_attn", "0.layers.1.self_attn"]


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
    assert torch.allclose(seen.output, attend(x))
    assert seen.uncovered == {"torch.func transforms": 1}
    gradient = torch.func.grad(lambda x: attend(x).sum())
    assert torch.allclose(record(Lambda(gradient), x).output, gradient(x))


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
    assert torch.allclose(program.module()(x), model(x))
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


# ---- what is kept


def test_between_passes_nothing_of_the_model_or_its_tensors_is_held():
    model, ids = Transformer(), torch.randint(0, 11, (3, 7))
    capture = capture_of(model)
    with hooked(model, capture):
        model(ids)
    assert recorded(capture).heads
    gone = weakref.ref(model.blocks[0])
    del model
    assert gone() is None


def test_a_copied_model_is_not_recorded():
    model = Lambda(lambda x: sdpa(x, x, x))
    capture = capture_of(model)
    capture.enter(model)
    copied = copy.deepcopy(model)
    copied(qkv()[0])
    capture.leave()
    assert recorded(capture).heads == {}
    assert sum(capture.uncovered.values()) == 1


def test_importing_it_does_not_load_the_compiler():
    code = "import sys, torchprobe.capture.attention.capture; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
