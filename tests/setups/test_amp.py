"""Mixed precision: what the optimizer uses, and steps that GradScaler skips."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

import torchprobe
from tests.clocks import reproducible
from tests.setups.reference import gradients, l2, moments
from torchprobe.testing import MemoryWriter

SCALE = 2.0**12


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def batch(seed: int) -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))


def adamw(model: nn.Module, fused: bool) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=SCALE)


def loss_of(model: nn.Module, seed: int, bad: bool = False) -> torch.Tensor:
    """bad: the gradient is infinite."""
    return model(batch(seed)).square().mean() * (torch.inf if bad else 1.0)


@pytest.fixture(params=[False, True], ids=["unfused", "fused"])
def fused(request) -> bool:
    return request.param


PATTERNS = ["before forward", "between forward and backward", "after step"]


@pytest.fixture(params=PATTERNS)
def zero_grad(request) -> str:
    return request.param


def train(model, optimizer, scaler, zero_grad: str, bad: tuple[bool, ...], session) -> list[float]:
    """The usual loop; the norms of the unscaled gradients of the steps that were taken."""
    norms = []
    for k, is_bad in enumerate(bad):
        if zero_grad == "before forward":
            optimizer.zero_grad()
        loss = loss_of(model, k, is_bad)
        if zero_grad == "between forward and backward":
            optimizer.zero_grad()
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        if not is_bad:
            norms.append(l2(*gradients(model).values()) / scale)
        session.log_metrics({"k": k})
        scaler.step(optimizer)
        scaler.update()
        if zero_grad == "after step":
            optimizer.zero_grad()
        assert session.step == len(norms)
    return norms


def test_the_gradient_norms_are_those_of_the_run_without_a_scaler(fused):
    plain, scaled = net(), MemoryWriter()
    model, expected = copy.deepcopy(plain), MemoryWriter()
    optimizer = adamw(plain, fused)
    with torchprobe.instrument(plain, writer=expected, every=1):
        for k in range(3):
            optimizer.zero_grad()
            loss_of(plain, k).backward()
            optimizer.step()
    with torchprobe.instrument(model, writer=scaled, every=1) as session:
        train(model, adamw(model, fused), scaler(), "before forward", (False,) * 3, session)
    tags = [tag for tag in expected.tags() if reproducible(tag)]
    assert [tag for tag in scaled.tags() if tag != "k" and reproducible(tag)] == tags
    for tag in tags:
        want = [(step, pytest.approx(value, rel=1e-4, abs=1e-7)) for step, value in expected.scalars(tag)]
        assert scaled.scalars(tag) == want, tag


def test_clipping_after_unscaling_shows_the_clipped_norm_and_the_unscaled_loss(fused):
    model, writer, grad_scaler = net(), MemoryWriter(), scaler()
    optimizer = adamw(model, fused)
    losses = []
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(2):
            optimizer.zero_grad()
            loss = 100 * loss_of(model, k)
            losses.append(loss.item())
            grad_scaler.scale(loss).backward()
            grad_scaler.unscale_(optimizer)
            assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5) > 0.5
            grad_scaler.step(optimizer)
            grad_scaler.update()
    assert [norm for _, norm in writer.scalars("overview/grad_norm")] == pytest.approx([0.5, 0.5], rel=1e-4)
    assert [loss for _, loss in writer.scalars("overview/loss")] == pytest.approx(losses)


def test_a_skipped_step_is_no_step_and_is_counted(fused, zero_grad):
    model, writer = net(), MemoryWriter()
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        norms = train(model, adamw(model, fused), scaler(), zero_grad, (True, False, False, True, True, False), session)
    assert writer.scalars("overview/grad_norm") == [(k + 1, pytest.approx(norm)) for k, norm in enumerate(norms)]
    assert writer.value("overview/skipped_steps") == 3
    assert writer.scalars("k") == [(1, 1.0), (2, 2.0), (3, 5.0)]
    for tag in ("lr/AdamW/group_0", "update_ratio/0.weight", "overview/loss"):
        assert [step for step, _ in writer.scalars(tag)] == [1, 2, 3], tag
    assert not [tag for tag in writer.tags() if "nonfinite" in tag]


@pytest.mark.parametrize("rules", [None, []], ids=["all rules", "no rules"])
def test_a_step_is_skipped_whichever_gradient_is_not_finite(rules):
    """Those of the first layer stay finite, as where a sum over rows is too large for float16."""
    model, writer, grad_scaler = net(), MemoryWriter(), scaler()
    optimizer = adamw(model, fused=False)
    skipped = 0
    with torchprobe.instrument(model, writer=writer, every=1, rules=rules):
        for k in range(9):
            optimizer.zero_grad()
            hook = model[2].weight.register_hook(lambda gradient: gradient * torch.inf) if k in (0, 1, 4, 6) else None
            before = grad_scaler.get_scale()
            grad_scaler.scale(loss_of(model, k)).backward()
            if hook is not None:
                hook.remove()
            if k == 7:  # the user leaves out a batch whose gradients are finite
                continue
            grad_scaler.step(optimizer)
            grad_scaler.update()
            skipped += grad_scaler.get_scale() < before
    assert skipped == 4
    assert writer.value("overview/skipped_steps") == 4
    assert [step for step, _ in writer.scalars("overview/loss")] == [1, 2, 3, 4]


def test_gradients_that_nobody_uses_are_no_reason_to_look_for_a_scaler_once_steps_had_none(monkeypatch):
    model, looks = net(), []
    optimizer = adamw(model, fused=False)
    objects = gc.get_objects
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1, rules=[]):
        for k in range(2):
            optimizer.zero_grad()
            loss_of(model, k).backward()
            optimizer.step()
        monkeypatch.setattr(gc, "get_objects", lambda *args: looks.append(1) or objects(*args))
        for k in range(4):  # as of another network's loss
            optimizer.zero_grad()
            loss_of(model, k).backward()
    assert looks == []


def test_growth_of_the_scale_hides_no_skipped_step():
    model, writer = net(), MemoryWriter()
    grad_scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1)
    optimizer = adamw(model, fused=False)
    with torchprobe.instrument(model, writer=writer, every=1, rules=[]):
        for bad in (False, True, False, True, False):
            optimizer.zero_grad()
            grad_scaler.scale(loss_of(model, 0, bad)).backward()
            grad_scaler.step(optimizer)
            grad_scaler.update()
    assert writer.value("overview/skipped_steps") == 2


@pytest.mark.parametrize("zero_grad", ["before forward", "after step"])
def test_what_a_skipped_iteration_captured_mixes_with_no_step(fused, zero_grad):
    model, writer, outputs, losses = net(), MemoryWriter(), {}, {}
    model.register_forward_hook(lambda module, args, out: outputs.__setitem__(len(outputs), out.detach().clone()))
    bad = (False, True, False)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        train(model, adamw(model, fused), scaler(), zero_grad, bad, session)
    losses = [outputs[k].double().square().mean().item() for k in (0, 2)]
    for key, value in moments(outputs[2]).items():
        assert writer.value(f"activation_{key}/2", step=2) == pytest.approx(value, rel=1e-6, abs=1e-12)
    assert [loss for _, loss in writer.scalars("overview/loss")] == pytest.approx(losses)


def test_gradients_of_outputs_are_those_of_the_unscaled_loss(fused):
    model, writer, grad_scaler, norms = net(), MemoryWriter(), scaler(), []
    optimizer = adamw(model, fused)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(2):
            optimizer.zero_grad()
            out = model(batch(k))
            out.retain_grad()
            grad_scaler.scale(out.square().mean()).backward()
            norms.append(l2(out.grad) / SCALE)
            grad_scaler.step(optimizer)
            grad_scaler.update()
    assert [norm for _, norm in writer.scalars("activation_grad_norm/2")] == pytest.approx(norms)


def test_several_micro_batches_under_a_scaler(fused):
    model, writer, grad_scaler = net(), MemoryWriter(), scaler()
    optimizer = adamw(model, fused)
    losses = []
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(2):
            optimizer.zero_grad()
            micro_batches = []
            for i in range(3):
                loss = loss_of(model, 3 * k + i) / 3
                micro_batches.append(loss.item())
                grad_scaler.scale(loss).backward()
            losses.append(sum(micro_batches))
            norm = l2(*gradients(model).values()) / SCALE
            grad_scaler.step(optimizer)
            grad_scaler.update()
        assert session.step == 2
    assert [loss for _, loss in writer.scalars("overview/loss")] == pytest.approx(losses)
    assert writer.value("overview/grad_norm", 2) == pytest.approx(norm)


def test_fp16_gradients_that_are_too_small_for_fp16_once_they_are_unscaled():
    model, writer, grad_scaler = net().half(), MemoryWriter(), scaler()
    optimizer = adamw(model, fused=True)
    with torchprobe.instrument(model, writer=writer, every=1):
        grad_scaler.scale(1e-7 * model(batch(0).half()).float().sum()).backward()
        expected = {name: l2(gradient) / SCALE for name, gradient in gradients(model).items()}
        grad_scaler.step(optimizer)
    for name, norm in expected.items():
        assert writer.value(f"grad_norm/{name}") == pytest.approx(norm, rel=1e-6)


def test_two_optimizers_under_one_scaler(fused):
    model, writer, grad_scaler = net(), MemoryWriter(), scaler()
    optimizers = [torch.optim.AdamW(part.parameters(), fused=fused) for part in (model[0], model[2])]
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        expected = []
        for k in range(3):
            model.zero_grad()
            grad_scaler.scale(loss_of(model, k)).backward()
            expected.append(l2(*gradients(model).values()) / SCALE)
            for optimizer in optimizers:
                grad_scaler.step(optimizer)
            grad_scaler.update()
            assert session.step == k + 1
    assert [norm for _, norm in writer.scalars("overview/grad_norm")] == pytest.approx(expected)


def test_activations_under_autocast_are_those_of_the_bf16_outputs():
    model, writer, outputs = net(), MemoryWriter(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.register_forward_hook(lambda module, args, out: outputs.append(out.detach().clone()))
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, k)
            loss.backward()
            norm = l2(*gradients(model).values())
            optimizer.step()
    assert outputs[0].dtype == torch.bfloat16
    for k, out in enumerate(outputs):
        for key, value in moments(out).items():
            assert writer.value(f"activation_{key}/2", step=k + 1) == pytest.approx(value, rel=1e-6), key
    assert writer.value("overview/grad_norm") == pytest.approx(norm)


def test_large_and_small_bf16_activations_never_go_through_fp16():
    class Scale(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.bfloat16))

        def forward(self, x):
            return x * self.factor

    model, writer = nn.Sequential(Scale(1e30), Scale(1e-38)), MemoryWriter()
    outputs = []
    model[0].register_forward_hook(lambda module, args, out: outputs.append(out))
    model[1].register_forward_hook(lambda module, args, out: outputs.append(out))
    with torchprobe.instrument(model, writer=writer, every=1):
        model(batch(0).bfloat16())
    for name, out in zip("01", outputs, strict=True):
        for key, value in moments(out).items():
            near = pytest.approx(value, rel=2e-6, abs=1e-5 if key == "kurtosis" else 0)  # a difference from 3
            assert writer.value(f"activation_{key}/{name}") == near, key
