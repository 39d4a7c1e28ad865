"""What Triton's kernels read is what the slow twins say, here by Triton's interpreter; on a GPU see `tests/device`."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.statistics import reference
from tests.statistics.strategies import tensors
from torchprobe.statistics import fused, histograms
from torchprobe.statistics.dtypes import real

TYPES = (torch.float16, torch.float32, torch.complex64, torch.float8_e4m3fn)
"""Without bfloat16, whose subnormals the interpreter alone takes for 0; those are tested on a GPU."""

COUNT, MEAN, M2, MAX_ABS, ZEROS, NONFINITE, FOURTH, SQUARES, MAGNITUDES = range(9)
EXACT = [COUNT, MAX_ABS, ZEROS, NONFINITE]


pytest.importorskip("triton", reason="needs triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")


@pytest.fixture(
    scope="module",
    params=[(2**11, 2**10, 2**7), (3, 4, 2), (1, 8, 4)],
    ids=["one program", "several", "several blocks"],
)
def launches(request):
    """How tensors are cut up."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(("_PROGRAMS", "_BLOCK", "_MERGED"), request.param, strict=True):
            patch.setattr(fused, name, value)
        patch.setattr(fused, "LINES", 3)
        yield


def assert_row(row: torch.Tensor, x: torch.Tensor) -> None:
    row, expected = row.tolist(), [*reference.moments(x), *reference.finite_sums(x)[:2]]
    assert [row[i] for i in EXACT] == [expected[i] for i in EXACT]
    largest, n = expected[MAX_ABS], max(expected[COUNT], 1)
    assert row[MEAN] == pytest.approx(expected[MEAN], rel=0, abs=1e-14 * largest)
    slack = 1e-15 * largest
    tolerance = 1e-12 * expected[M2] + 4 * slack * math.sqrt(n * expected[M2]) + 4 * n * slack**2
    assert row[M2] == pytest.approx(expected[M2], rel=0, abs=tolerance)
    for column in (FOURTH, SQUARES, MAGNITUDES):
        assert row[column] == pytest.approx(expected[column], rel=1e-13, abs=0)
    finite = reference.finite(x)
    assert row[fused.ENDS] == [min(finite, default=0.0), max(finite, default=0.0)]
    assert row[fused.SQUARES] == pytest.approx([reference.squares(x), expected[NONFINITE]], rel=1e-13, nan_ok=True)


@given(many=st.lists(tensors(TYPES), min_size=1, max_size=4))
@settings(max_examples=12, deadline=None)
def test_rows_are_those_of_the_finite_elements(many, launches):
    for row, x in zip(fused.rows([real(x).contiguous() for x in many]), many, strict=True):
        assert_row(row, x)


@given(many=st.lists(tensors(TYPES), min_size=1, max_size=4))
@settings(max_examples=12, deadline=None)
def test_codes_are_float32s_exponents(many, launches):
    parts = [real(x).contiguous() for x in many]
    for row, x in zip(fused.codes(parts), parts, strict=True):
        exponents = (x.float().reshape(-1).view(torch.int32) >> 23) & 255
        assert row[:256].tolist() == torch.bincount(exponents, minlength=256).tolist()
        assert row[256] == x.count_nonzero()


@given(many=st.lists(tensors(TYPES), min_size=1, max_size=4))
@settings(max_examples=12, deadline=None)
def test_counts_by_bucket_are_those_of_torchs_operations(many, launches):
    parts = [real(x).contiguous() for x in many]
    expected = histograms.linear_histograms(parts, 16)
    assert torch.equal(histograms._fused(parts, 16), expected)


def test_bfloat16(launches):
    x = torch.tensor([1.5, -3.0, 0.0, math.nan, 1e38, math.inf] * 5, dtype=torch.bfloat16)
    assert_row(fused.rows([x])[0], x)
    assert fused.codes([x])[0, 256] == 25
    assert torch.equal(histograms._fused([x], 8), histograms.linear_histograms([x], 8))


def test_equal_elements_have_no_deviation_over_many_programs(launches):
    x = torch.full((700,), 1.468)
    assert fused.rows([x])[0, M2] == 0.0


def test_the_first_elements_may_all_be_infinite(launches):
    x = torch.cat((torch.full((9,), math.inf), 1e6 + torch.randn(50)))
    assert_row(fused.rows([x])[0], x)


def test_host_memory_float64_and_fake_tensors_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(fused, "GPUS", ("cpu",))
    assert fused.applies_to(torch.ones(3))
    assert fused.applies_to(torch.ones(2, 3, 4).transpose(0, 2))
    assert not fused.applies_to(torch.ones(3, dtype=torch.float64))
    assert not fused.applies_to(torch.ones(4)[::2])
    assert not fused.applies_to(torch.ones(1).expand(4))
    with torch._subclasses.FakeTensorMode():
        assert not fused.applies_to(torch.ones(3))


def test_without_triton_nothing_is_claimed(monkeypatch, caplog):
    """No Triton is no news; kernels that do not run are said once."""
    monkeypatch.setattr(fused, "rows", lambda x: exec("raise ImportError"))
    fused.usable.cache_clear()
    assert not fused.usable("cpu")
    assert not caplog.records
    monkeypatch.setattr(fused, "rows", lambda x: exec("raise RuntimeError('no compiler')"))
    fused.usable.cache_clear()
    assert [fused.usable("cpu") for _ in range(2)] == [False, False]
    assert [record.levelname for record in caplog.records if record.levelno >= 30] == ["WARNING"]
    fused.usable.cache_clear()


@given(many=st.lists(tensors((torch.float32,)), min_size=1, max_size=4), flags=st.lists(st.booleans(), min_size=4))
@settings(max_examples=12, deadline=None)
def test_lines_in_place_hold_what_was_added_while_the_flag_was_set(many, flags, launches):
    parts = [real(x).contiguous() for x in many]
    lines = [fused.lines(torch.device("cpu")) for _ in range(2)]
    on = [x for x, wanted in zip(parts, flags, strict=False) if wanted]
    for x, wanted in zip(parts, flags, strict=False):
        lines[1][-1, 0] = float(wanted)
        fused.add(x, lines[1])
    found, calls = fused.all_added(lines)
    assert calls.tolist() == [0, sum(x.numel() > 0 for x in on)]
    assert found[0].tolist() == [0.0] * fused.COLUMNS
    assert_row(found[1], torch.cat([x.reshape(-1) for x in on]) if on else torch.zeros(0))
