"""What makes the attention statistics safe in a hook: nothing read on the host, nothing changed, bounded memory."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import fields
from unittest import mock

import pytest
import torch

from tests.modes import Allocations, Largest, NoHostRead
from tests.statistics.attention_sources import blocks_of, causal_bias, decaying, query_key
from torchprobe.statistics import attention
from torchprobe.statistics.attention import Logits, QueryKey, Source
from torchprobe.statistics.attention import rows as attention_rows

SOURCES = {
    "plain": query_key(queries=40),
    "causal": query_key(queries=40, key_heads=2, causal=True),
    "bfloat16": query_key(queries=40, dtype=torch.bfloat16, mask=causal_bias(40, 40, torch.bfloat16)),
    "float64": query_key(queries=40, dtype=torch.float64),
    "bool mask": query_key(queries=40, mask=torch.rand(2, 4, 40, 40) > 0.5, padding=torch.rand(2, 40) > 0.5),
    "everything": query_key(queries=40, softcap=2.0, modify=decaying, sinks=torch.randn(4), causal=True),
    "many sequences": query_key(batch=50, queries=6, causal=True),
    "logits": Logits(torch.randn(2, 4, 40, 30), torch.rand(2, 40) > 0.5),
    "half logits": Logits(torch.randn(2, 4, 40, 30).half()),
}

STATISTICS = {
    "all": lambda source: attention.compute(source, "all", None),
    "sampled": lambda source: attention.compute(source, 16, torch.Generator().manual_seed(0)),
    "map": lambda source: attention.attention_map(source, 8, 1, torch.Generator().manual_seed(0)),
}


@pytest.fixture(params=SOURCES.values(), ids=SOURCES.keys())
def source(request) -> Source:
    return request.param


@pytest.fixture(params=STATISTICS.values(), ids=STATISTICS.keys())
def statistic(request):
    return request.param


def tensors(source: Source) -> list[torch.Tensor]:
    return [x for x in vars(source).values() if isinstance(x, torch.Tensor)]


def like(source: Source, change) -> Source:
    """The same call with other tensors."""
    values = {field.name: getattr(source, field.name) for field in fields(source)}
    return type(source)(**{k: change(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()})


@pytest.mark.parametrize("block", [400, 2**18])
def test_nothing_is_read_on_the_host(source, statistic, block):
    with blocks_of(block), NoHostRead():
        statistic(source)


def test_nothing_is_read_on_the_host_to_combine():
    row = attention.compute(SOURCES["plain"], "all", None)
    with NoHostRead():
        attention.combine(row, row)


def test_off_the_cpu_no_operation_needs_a_value(source, statistic):
    """Meta tensors have no values, and take the way of other devices: whatever would wait for one raises."""
    result = statistic(like(source, lambda x: torch.empty_like(x, device="meta")))
    assert result.device.type == "meta"
    assert result.shape == statistic(source).shape


def test_inputs_and_global_random_state_are_untouched(source, statistic):
    before, state = [x.clone() for x in tensors(source)], torch.get_rng_state()
    statistic(source)
    assert all(torch.equal(x, y) for x, y in zip(tensors(source), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_result_has_no_history(source, statistic):
    with torch.enable_grad():
        result = statistic(like(source, lambda x: x.clone().requires_grad_() if x.is_floating_point() else x))
    assert not result.requires_grad


def test_blocks_change_the_result_by_rounding_alone(source, statistic):
    expected = statistic(source)
    with blocks_of(50):
        torch.testing.assert_close(statistic(source), expected, rtol=1e-5, atol=1e-5)


def test_rows_are_of_the_type_of_all_statistics(source):
    row = attention.compute(source, 16, None)
    assert (row.shape, row.dtype) == ((4, len(attention.FIELDS)), torch.float64)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_temporary_is_as_large_as_the_keys_or_a_head_of_the_matrix(dtype, causal):
    """One head of the matrix has 40,000 elements, the keys have 25,600, a head of them 3,200."""
    source = query_key(1, 8, queries=200, width=16, dtype=dtype, causal=causal)
    with blocks_of(2000), Largest() as largest:
        attention.compute(source, "all", None)
    assert 0 < largest.elements <= 6 * 8 * 200, "no more than the six columns of every row"
    with blocks_of(2000), Largest() as largest:
        attention.compute(source, 32, None)
    assert 0 < largest.elements <= 16000


def test_each_head_is_worked_on_in_the_memory_of_the_one_before():
    """Fresh pages for every head would cost a tenth of the statistic."""

    def large_allocations(heads: int) -> int:
        source = query_key(1, heads, queries=400, width=16, causal=True)
        strided = like(source, lambda x: torch.stack((x, x), -1)[..., 0])
        in_pieces = mock.patch.multiple(attention_rows, CPU_LOGITS_PER_THREAD=2000, PRODUCT_ROWS=8)
        with in_pieces, Allocations(400 * 16) as allocations:
            attention.compute(strided, 32, None)
        return allocations.count

    assert 0 < large_allocations(16) < 4, "with the queries of all heads"


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
    "gradients on": torch.enable_grad,
}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS.keys())
def test_the_users_settings_change_no_bit(source, statistic, context):
    expected = statistic(source)
    with context():
        result = statistic(source)
    assert torch.equal(result, expected)


def test_strides_are_of_no_consequence(statistic):
    source = SOURCES["causal"]
    scattered = like(source, lambda x: torch.stack((x, x), -1)[..., 0])
    torch.testing.assert_close(statistic(scattered), statistic(source), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_without_waiting(source, statistic):
    on_gpu = like(source, lambda x: x.cuda())
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = statistic(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.cpu(), statistic(source), rtol=1e-4, atol=1e-4)


def test_a_source_is_a_value_that_cannot_change():
    with pytest.raises(AttributeError):
        SOURCES["plain"].scale = 2.0
    assert isinstance(SOURCES["plain"], QueryKey)
