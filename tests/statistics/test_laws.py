"""What holds for every statistic: no host read, inputs and random state untouched, bounded memory, any context."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.modes import Largest, NoHostRead
from torchprobe.statistics import histograms, moments, norms


def combined(x: torch.Tensor) -> torch.Tensor:
    return moments.combine(moments.compute(x), moments.compute(x))


STATISTICS = {
    "compute": moments.compute,
    "combine": combined,
    "sum_squares": norms.sum_squares,
    "finite_sums": lambda x: norms.finite_sums([x, x[:2]]),
    "l2_norms": lambda x: norms.l2_norms([x, x[:2]]),
    "log_histogram": histograms.log_histogram,
    "linear_histogram": histograms.linear_histogram,
}

DTYPES = (torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)


@pytest.fixture(params=STATISTICS.values(), ids=STATISTICS.keys())
def statistic(request):
    return request.param


def sample(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(20, 30)
    x[0, :4] = torch.tensor([math.nan, math.inf, 0.0, -1e-40])
    return x.to(dtype)


def samples() -> Iterator[torch.Tensor]:
    return map(sample, DTYPES)


def all_finite() -> torch.Tensor:
    return torch.randn(20, 30)


def test_the_mode_catches_a_host_read():
    with pytest.raises(AssertionError, match="host read"), NoHostRead():
        torch.ones(1).item()


@pytest.mark.parametrize("size", [50, 2**18])
def test_nothing_is_read_on_the_host(statistic, size, in_chunks_of):
    for x in (*samples(), all_finite()):
        with in_chunks_of(size), NoHostRead():
            statistic(x)
            statistic(x.t())
            statistic(x[:0])


def test_off_the_cpu_no_operation_needs_a_value(statistic):
    """Meta tensors have no values, and take the way of other devices: whatever would wait for one raises."""
    for x in samples():
        assert statistic(torch.empty_like(x, device="meta")).shape == statistic(x).shape


def test_inputs_are_not_modified(statistic):
    for x in (*samples(), all_finite()):
        before = x.clone()
        statistic(x)
        assert torch.equal(x.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_without_waiting(statistic):
    for x in samples():
        on_gpu = x.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = statistic(on_gpu)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(result.cpu(), statistic(x), rtol=1e-12, atol=1e-12)


def test_random_state_is_untouched(statistic):
    x = sample()
    before = torch.get_rng_state()
    statistic(x)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_result_has_no_history(statistic):
    assert not statistic(sample().requires_grad_()).requires_grad


def test_a_second_call_gives_the_same_bits(statistic):
    x = sample()
    assert torch.equal(statistic(x), statistic(x))


def test_memory_is_bounded_by_the_piece(statistic, in_chunks_of):
    x = torch.randn(400).expand(50, 400)
    with in_chunks_of(1000), Largest() as largest:
        statistic(x)
    assert 0 < largest.elements <= 2000


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


CONTEXTS = {
    "deterministic": deterministic,
    "float64 by default": float64_by_default,
    "meta by default": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("make", [sample, all_finite])
@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS.keys())
def test_the_users_settings_change_no_bit(statistic, make, context):
    x = make()
    expected = statistic(x)
    with context():
        result = statistic(x)
    assert torch.equal(result, expected)
