"""What a GPU could break of what the README promises: `pytest -m gpu`. Nothing here runs without a CUDA device.

The device that is not there shows most of it on a CPU (the other files of this folder); what needs real streams, real
graphs, real memory and real kernels is here.
"""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import torchprobe
from tests.device.training import Net, batch, everything, goes_wrong_unsampled, scalars, step
from torchprobe.testing import MemoryWriter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def train(device, steps=3, watch=True, probes=None, after=None, model=None, **options):
    torch.manual_seed(0)
    batches = [[part.to(device) for part in batch()] for _ in range(steps)]
    model = (Net() if model is None else model).to(device)
    writer = MemoryWriter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
    session = torchprobe.instrument(model, writer=writer, probes=probes or everything()) if watch else None
    for i, (tokens, targets) in enumerate(batches):
        step(model, optimizer, tokens, targets)
        if after is not None:
            after(i)
    if session is not None:
        assert session.detach(60)
    return [p.detach().cpu() for p in model.parameters()], scalars(writer), session


def test_weights_and_random_state_are_bitwise_the_same():
    runs = [(train("cuda", watch=watch)[0], torch.cuda.get_rng_state()) for watch in (True, False)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True))
    assert torch.equal(runs[0][1], runs[1][1])


def test_nothing_waits_in_idle_and_sampled_steps(errors_on_waiting):
    """Suspicion 14. The first step may: libraries are loaded, memory is pinned."""
    _, found, session = train("cuda", steps=4, after=lambda i: torch.cuda.set_sync_debug_mode("error" if i < 3 else 0))
    assert "failed" not in session.summary()
    assert (4, "overview/loss") in found


class Slow(nn.Linear):
    """Keeps the device busy for some 10 ms or more."""

    def forward(self, x):
        torch.cuda._sleep(30_000_000)
        return super().forward(x)


def test_the_times_of_a_step_are_those_of_the_device(errors_on_waiting):
    """A loop that waits for the loss after each step does not wait for its input, and nothing of ours waits."""
    model, writer = Slow(64, 8, device="cuda"), MemoryWriter()
    optimizer, x = torch.optim.SGD(model.parameters(), 0.1), torch.randn(32, 64, device="cuda")
    session = torchprobe.instrument(model, writer=writer)
    for number in range(30):
        torch.cuda.set_sync_debug_mode("error" if number > 1 else 0)
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.set_sync_debug_mode("default")
        loss.item()
    assert session.detach(60)
    assert "failed" not in session.summary()
    names = ("forward", "input_wait", "backward", "optimizer")
    found = {name: dict(writer.scalars(f"performance/{name}_seconds")) for name in names}
    for name in ("forward", "backward", "optimizer"):
        assert [*found[name]] == [4, 9, 19], name  # no other probe is due
    assert all(value > 0.003 for value in found["forward"].values())
    assert [*found["input_wait"]] == [4, 5, 9, 10, 19, 20]  # nor in the step before
    assert all(found["input_wait"][step] < 0.5 * forward for step, forward in found["forward"].items())
    assert not [alert for alert in session.alerts if alert.rule == "input_bound"]
    assert writer.value("performance/peak_memory_bytes", step=19) == pytest.approx(
        torch.cuda.max_memory_allocated(), rel=0.5
    )


def test_values_are_those_of_the_cpu():
    _, expected, _ = train("cpu")
    _, found, _ = train("cuda")
    loose = {key for key in expected if "zeros" in key[1] or "unit" in key[1]}
    assert found.keys() == expected.keys()
    for key in expected.keys() - loose:
        assert found[key] == pytest.approx(expected[key], rel=1e-2, abs=1e-4, nan_ok=True), key


def test_rows_made_on_a_side_stream_are_complete():
    """Suspicion 2."""
    model = nn.Linear(4, 4).cuda()
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.zero_()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    writer, side = MemoryWriter(), torch.cuda.Stream()
    with torchprobe.instrument(model, writer=writer, probes=[torchprobe.Activations(every=1)]):
        for i in range(20):
            with torch.cuda.stream(side):
                torch.cuda._sleep(10_000_000)
                optimizer.zero_grad()
                model(torch.full((2, 4), float(i + 1), device="cuda")).sum().backward()
                optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
    assert [writer.value("activation_mean/root", step=i + 1) for i in range(20)] == [4.0 * (i + 1) for i in range(20)]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_over_two_gpus():
    """Suspicions 6 and 13: autograd runs a thread for each."""
    from tests.device.test_devices import trained

    expected, found = trained("cpu", "cpu"), trained("cuda:0", "cuda:1")
    assert found.keys() == expected.keys()


def test_two_models_in_two_threads_keep_their_losses_apart():
    """Suspicion 7."""
    found = {}

    def run(scale):
        model, writer = nn.Linear(4, 3).cuda(), MemoryWriter()
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        with torchprobe.instrument(model, writer=writer, probes=[torchprobe.Loss()]):
            for _ in range(200):
                optimizer.zero_grad()
                (model(torch.ones(2, 4, device="cuda")).sum() * 0.0 + scale).backward()
                optimizer.step()
        found[scale] = {value for (_, tag), value in scalars(writer).items() if tag == "overview/loss"}

    threads = [threading.Thread(target=run, args=(scale,)) for scale in (100.0, 200.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {100.0: {100.0}, 200.0: {200.0}}


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_that_skips(errors_on_waiting, fused):
    """Suspicions 9 and 10: gradients are unscaled, the skipped step is counted, and a fused one is not waited for."""
    torch.manual_seed(0)
    model, writer = nn.Linear(4, 3).cuda(), MemoryWriter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    norms_seen = []
    with torchprobe.instrument(model, writer=writer, probes=[torchprobe.Gradients(every=1), torchprobe.Loss()]):
        for i in range(5):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=torch.float16):
                loss = model(torch.randn(8, 4, device="cuda")).square().mean()
            scaler.scale(loss * (float("inf") if i == 2 else 1.0)).backward()
            if i != 2:
                total = sum((p.grad.double() / scaler.get_scale()).square().sum() for p in model.parameters())
                norms_seen.append(float(total) ** 0.5)
            scaler.step(optimizer)
            scaler.update()
    found = [value for (_, tag), value in sorted(scalars(writer).items()) if tag == "overview/grad_norm"]
    assert found == pytest.approx(norms_seen, rel=1e-4)
    assert writer.value("overview/skipped_steps") == 1


@pytest.mark.parametrize(("bad", "of"), [("forward", "output"), ("backward", "gradient")])
def test_numbers_that_are_not_finite_are_seen_in_a_step_that_nothing_samples(bad, of):
    goes_wrong_unsampled(torch.device("cuda"), bad, of)


def test_memory_does_not_grow():
    """Suspicions 8 and 11: transfer buffers and copies of parameters."""
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8))).cuda()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    reserved = []
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1):
        for i in range(300):
            optimizer.zero_grad()
            model(torch.randn(16, 256, device="cuda")).square().mean().backward()
            optimizer.step()
            if i in (50, 299):
                reserved.append(torch.cuda.memory_reserved())
    assert reserved[1] <= 1.1 * reserved[0]


def test_masks_in_host_memory_are_read_without_waiting(errors_on_waiting):
    """Suspicion 12."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True).cuda()
    optimizer = torch.optim.SGD(attention.parameters(), 0.1)
    padding = (torch.arange(6).expand(4, 6) >= 4).pin_memory()
    with torchprobe.instrument(attention, writer=MemoryWriter(), probes=[torchprobe.Attention(every=1)]) as session:
        for i in range(4):
            x = torch.randn(4, 6, 8, device="cuda")
            torch.cuda.set_sync_debug_mode("error" if i else 0)
            optimizer.zero_grad()
            attention(x, x, x, key_padding_mask=padding.to("cuda", non_blocking=True))[0].sum().backward()
            optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
    assert "failed" not in session.summary()
