"""A whole step with every probe, on a device: nothing waits, and the numbers are those of the CPU."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchprobe
from tests.device.training import Net, batch, everything, goes_wrong_unsampled, scalars, step, values
from torchprobe.testing import MemoryWriter

FUSED = {"fused": True}


def train(device, steps=3, probes=None, seed=0, options=None, watch=True, **arguments):
    """Weights and what was written of a run on a device."""
    torch.manual_seed(seed)
    with torch.device(device):
        model, writer = Net(), MemoryWriter()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **(options or {}))
        session = (
            torchprobe.instrument(model, writer=writer, probes=probes or everything(), **arguments) if watch else None
        )
        for _ in range(steps):
            loss = step(model, optimizer, *batch())
            if session is not None:
                session.log_metrics({"loss": loss}, prefix="train")
        if session is not None:
            session.detach()
    return [p.detach().cpu() for p in model.parameters()], writer, session


def of(run, wanted):
    """The values of a tag, whatever the steps' numbers: a device's skipped step has one, since nobody asks it."""
    return [value for (_, tag), value in sorted(run.items()) if tag == wanted]


def without_zeros(writer):
    """Without counts of exact zeros: gradients that are 0 but for rounding, as those of a key's bias, may be either."""
    return {key: value for key, value in scalars(writer).items() if "zeros" not in key[1]}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-7, nan_ok=True), key  # steps sum up rounding


def test_every_probe_and_source_gives_what_it_gives_on_the_cpu_and_nothing_waits(fgpu):
    _, expected, _ = train("cpu")
    _, found, session = train(fgpu)
    assert "nothing captured" not in session.summary()
    assert "not seen" not in session.summary()
    assert_close(without_zeros(found), without_zeros(expected))
    assert {k: set(v) for k, v in values(found).items()} == {k: set(v) for k, v in values(expected).items()}


def test_weights_are_the_same_without(fgpu):
    watched, _, _ = train(fgpu, steps=4)
    bare, _, _ = train(fgpu, steps=4, watch=False)
    assert all(torch.equal(a, b) for a, b in zip(watched, bare, strict=True))


def test_the_default_probes_and_idle_steps(fgpu):
    _, writer, session = train(fgpu, steps=6, probes=None)
    assert session.step == 6
    assert (6, "overview/loss") in scalars(writer)


@pytest.mark.parametrize("options", [{}, FUSED, {"foreach": True}], ids=["plain", "fused", "foreach"])
@pytest.mark.parametrize("overflow", [False, True])
def test_a_grad_scaler_whose_verdict_is_on_the_device(fgpu, options, overflow):
    """Fused optimizers get `found_inf` and `grad_scale`, and skip by themselves; nobody asks the device whether."""
    runs = []
    for device in ("cpu", fgpu):
        torch.manual_seed(0)
        with torch.device(device):
            model, writer = nn.Linear(4, 3), MemoryWriter()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
            scaler = torch.amp.GradScaler(torch.device(device).type, init_scale=64.0)
            session = torchprobe.instrument(
                model, writer=writer, probes=[torchprobe.Gradients(every=1), torchprobe.Loss()]
            )
            for i in range(4):
                optimizer.zero_grad()
                loss = model(torch.randn(5, 4)).square().mean() * (float("inf") if overflow and i == 1 else 1.0)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            session.detach()
        runs.append((scalars(writer), "skipped steps     1" in session.summary()))
    (expected, skipped_there), (found, skipped) = runs
    assert skipped == skipped_there == overflow
    assert of(found, "overview/grad_norm") == pytest.approx(of(expected, "overview/grad_norm"), rel=1e-5)
    assert of(found, "overview/loss") == pytest.approx(of(expected, "overview/loss"), rel=1e-5)
    assert of(found, "overview/skipped_steps")[-1] == overflow


@pytest.mark.parametrize("rules", [None, []], ids=["all rules", "no rules"])
def test_a_scalers_scale_on_the_device_tells_of_skipped_steps(fgpu, rules):
    """The first layer's gradients stay finite, and nobody reads the scale."""
    with torch.device(fgpu):
        model, writer = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), MemoryWriter()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler(torch.device(fgpu).type, init_scale=64.0)
        with torchprobe.instrument(model, writer=writer, every=1, rules=rules):
            for i in range(6):
                optimizer.zero_grad()
                loss = model(torch.randn(5, 4)).square().mean()
                last = model[2].weight
                hook = last.register_hook(lambda gradient: gradient * torch.inf) if i in (0, 2, 3) else None
                scaler.scale(loss).backward()
                if hook is not None:
                    hook.remove()
                scaler.step(optimizer)
                scaler.update()
    assert of(scalars(writer), "overview/skipped_steps")[-1] == 3
    assert len(of(scalars(writer), "overview/loss")) == 3


def test_masks_and_labels_in_host_memory(fgpu):
    """Where the user's program copes with them, so does ours: nothing waits, and no operand is on the wrong device."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 5)

        def forward(self, x, padding, labels):
            y, _ = self.attention(x, x, x, key_padding_mask=padding.to(x.device, non_blocking=True))
            return F.cross_entropy(self.head(y.mean(1)), labels.to(x.device, non_blocking=True))

    found = {}
    for device in ("cpu", fgpu):
        torch.manual_seed(0)
        with torch.device(device):
            model, writer = Masked(), MemoryWriter()
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            session = torchprobe.instrument(model, writer=writer, probes=everything())
            for _ in range(3):
                x = torch.randn(4, 6, 8)
                padding = torch.arange(6, device="cpu").expand(4, 6) >= 4
                labels = torch.randint(0, 5, (4,), device="cpu")
                optimizer.zero_grad()
                model(x, padding=padding, labels=labels).backward()
                optimizer.step()
            session.detach()
        values = scalars(writer)  # which queries are padding is told by shared memory, which the device's does not say
        found[str(device)] = {key: value for key, value in values.items() if "attention_" not in key[1]}
    assert_close(found["fgpu:0"], found["cpu"])


def test_a_validation_pass_and_what_the_user_logs(fgpu):
    torch.manual_seed(0)
    with fgpu:
        model, writer = Net(), MemoryWriter()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with torchprobe.instrument(model, writer=writer, probes=everything()) as session:
            for _ in range(2):
                step(model, optimizer, *batch())
                model.eval()
                with torch.no_grad():
                    tokens, targets = batch()
                    logits = model(tokens)
                    session.log_predictions(logits.softmax(-1), targets)
                    session.log_metrics({"accuracy": (logits.argmax(-1) == targets).float().mean()}, prefix="val")
                model.train()
    last = values(writer)[2]
    assert {"val/accuracy", "val/calibration/accuracy", "val/activation_rms/head"} <= last.keys()


def test_where_nan_comes_from(fgpu):
    torch.manual_seed(0)
    with fgpu:
        model, writer = Net(), MemoryWriter()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with torchprobe.instrument(model, writer=writer) as session:
            for i in range(8):
                if i == 3:
                    with torch.no_grad():
                        model.block.linear1.bias[0] = float("nan")
                step(model, optimizer, *batch())
                session.flush()
    assert [alert.rule for alert in session.alerts if alert.rule == "non_finite"]


@pytest.mark.parametrize(("bad", "of"), [("forward", "output"), ("backward", "gradient")])
@pytest.mark.parametrize("parts", [1, 2])
def test_numbers_that_are_not_finite_are_seen_in_a_step_that_nothing_samples(fgpu, bad, of, parts):
    goes_wrong_unsampled(fgpu, bad, of, parts)


@pytest.mark.parametrize("every", [1, 100])
def test_no_graph_outlives_its_step(fgpu, every):
    """Without a garbage collector's help: it would hold memory, and autograd's nodes, whose stream the next has not."""
    model = nn.Linear(8, 4).to(fgpu)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randn(3, 8).to(fgpu)
    gone = []
    gc.disable()
    with torchprobe.instrument(model, writer=MemoryWriter(), every=every):
        for _ in range(4):
            out = model(x)
            node = next(node for node, _ in out.grad_fn.next_functions if "Accumulate" in node.name())
            seen = lambda *_: None  # noqa: E731 - it lives as long as the node does
            alive = weakref.ref(seen)
            node.register_hook(seen)
            out.square().mean().backward()
            del out, node, seen
            optimizer.step()
            optimizer.zero_grad()
            gone.append(alive() is None)
    gc.enable()
    assert gone == [True] * 4
