"""Whatever the user does around and inside the forward pass goes on as if nobody looked."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.capture.attention.harness import capture_of, hooked, record, recorded
from tests.capture.attention.passes import Lambda, depth, qkv, sdpa
from tests.models import Transformer
from torchprobe.capture import compat
from torchprobe.capture.attention import observer

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
    monkeypatch.setattr(observer, "measure", lambda *args: 1 / 0)
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

    monkeypatch.setattr(compat, "no_dispatch_modes", nullcontext)
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
    rows = capture.source.rows_of(capture.passes, training=True)[0].rows
    assert not rows.is_inference()
    assert not rows.requires_grad


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
    code = "import sys, torchprobe.capture.attention.source; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
