"""Statistics on a CUDA device are those of float64, and of torch's operations: `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

from torchprobe.statistics import fused, histograms, moments, norms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def awkward(dtype, size):
    """Ordinary numbers, subnormals, zeros and what is not finite."""
    x = torch.randn(size, device="cuda")
    x[::7], x[3::11] = 0.0, 1e-40
    x[5::1001] = torch.tensor(float("nan"))
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 1000, 3_000_001])
def test_one_read_gives_what_torchs_operations_give(dtype, size, monkeypatch):
    """Alone and in one launch with others, subnormals and missing numbers included."""
    pytest.importorskip("triton", reason="needs triton")
    many = [awkward(dtype, size), torch.full((4099,), 1.468, device="cuda"), torch.zeros(0, device="cuda", dtype=dtype)]
    assert all(map(fused.applies_to, many))
    statistics = (
        norms.finite_sums,
        histograms.log_histograms,
        histograms.linear_histograms,
        lambda some: torch.stack([*map(moments.compute, some)]),
        lambda some: torch.stack([*map(norms.sum_squares, some)]),
    )
    found = [statistic(many) for statistic in statistics]
    alone = [torch.cat([statistic([x]) for x in many]) for statistic in statistics]
    monkeypatch.setattr(fused, "GPUS", ())
    expected = [statistic(many) for statistic in statistics]
    for a, b, c in zip(found, alone, expected, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-11, atol=0)
        torch.testing.assert_close(b, c, rtol=1e-11, atol=0)
    assert found[3][1, 2] == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_statistics_against_float64(dtype, layout):
    """Suspicion 15."""
    x = torch.randn(8, 16, 32, 32, device="cuda").to(memory_format=layout).to(dtype)
    wide = x.double()
    assert norms.l2_norms([x])[0].item() == pytest.approx(wide.square().sum().sqrt().item(), rel=1e-6)
    row = dict(zip(moments.FIELDS, moments.compute(x).tolist(), strict=True))
    assert row["mean"] == pytest.approx(wide.mean().item(), abs=1e-6 * wide.abs().max().item())


def test_more_elements_than_32_bits_count():
    """Suspicion 15."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free device memory")
    x = torch.ones(2**31 + 5, device="cuda", dtype=torch.bfloat16)
    assert norms.l2_norms([x])[0].item() == pytest.approx((2**31 + 5) ** 0.5, rel=1e-6)
