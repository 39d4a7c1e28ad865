"""The sums of a whole model's gradients are those of each gradient alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.statistics import reference
from tests.statistics.strategies import piece_sizes, tensors
from torchprobe.statistics import norms


@given(many=st.lists(tensors(), max_size=6), piece=piece_sizes())
@settings(max_examples=150, deadline=None)
def test_each_tensor_has_its_own_sums(many, piece, in_chunks_of):
    with in_chunks_of(piece):
        rows = norms.finite_sums(many)
    assert rows.shape == (len(many), 4)
    for x, row in zip(many, rows.tolist(), strict=True):
        assert row == pytest.approx(reference.finite_sums(x), rel=1e-13)


@given(many=st.lists(tensors(), max_size=6), piece=piece_sizes())
@settings(max_examples=100, deadline=None)
def test_norms_are_those_of_the_finite_elements(many, piece, in_chunks_of):
    with in_chunks_of(piece):
        norm = norms.l2_norms(many).tolist()
    assert norm == pytest.approx([math.sqrt(reference.squares(x)) for x in many], rel=1e-13, nan_ok=True)


@given(many=st.lists(tensors(), max_size=4))
@settings(max_examples=50, deadline=None)
def test_a_row_or_a_sum_of_rows_tells_the_norm(many):
    rows = norms.finite_sums(many)
    alone = [math.sqrt(reference.squares(x)) for x in many]
    assert [norms.l2_norm(row) for row in rows.tolist()] == pytest.approx(alone, rel=1e-13, nan_ok=True)
    whole = torch.tensor([value for x in many for value in reference.elements(x)], dtype=torch.float64)
    together = math.sqrt(reference.squares(whole))
    assert norms.l2_norm(rows.sum(0).tolist()) == pytest.approx(together, rel=1e-12, nan_ok=True)


@given(many=st.lists(tensors(), max_size=6))
@settings(max_examples=100, deadline=None)
def test_the_largest_magnitude_is_exact_where_all_is_finite(many):
    found = norms.largest(many).tolist()
    for x, largest in zip(many, found, strict=True):
        bad = reference.nonfinite(x)
        assert not math.isfinite(largest) if bad else largest == reference.largest(x)


@pytest.mark.parametrize("n", [0, 1, 4095, 4096, 4097, 70_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_largest_magnitude_wherever_it_stands(n, dtype):
    for at in {0, n // 2, n - 1} if n else ():
        x = torch.linspace(-1, 1, n, dtype=dtype)
        x[at] = -7.0
        assert norms.largest([x, x.reshape(1, -1), x[:0]]).tolist() == [7.0, 7.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("n", [1, 5, 5000])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_finite_has_no_norm_and_zeros_and_emptiness_have_one_of_zero(dtype, n, bad, in_chunks_of):
    dead, zeros = (torch.full((n,), value).to(dtype) for value in (bad, 0.0))
    dead = torch.complex(dead.real, dead.real) if dtype.is_complex else dead
    mixed = torch.cat((dead, zeros[:1]))
    with in_chunks_of(1000):
        found = norms.l2_norms([dead, mixed, zeros, zeros[:0], dead]).tolist()
    assert found == pytest.approx([math.nan, 0.0, 0.0, 0.0, math.nan], nan_ok=True)


def test_a_tiny_float64_is_a_finite_element():
    assert norms.l2_norms([torch.tensor([1e-300, math.nan], dtype=torch.float64)]).tolist() == [0.0]


def test_a_step_to_nan_has_no_length():
    before, after = torch.randn(40), torch.full((40,), math.nan)
    update, norm, root = norms.distances([after], [before.clone()])[0].tolist()
    assert math.isnan(update)
    assert norm == pytest.approx(before.double().norm().item())
    assert root == 0
    assert norms.distances([after], [after.clone()])[0, :2].isnan().all()


@given(many=st.lists(tensors(), max_size=6), piece=piece_sizes())
@settings(max_examples=50, deadline=None)
def test_counts_are_exact(many, piece, in_chunks_of):
    with in_chunks_of(piece):
        counts = norms.finite_sums(many)[:, 2:].tolist()
    assert counts == [reference.finite_sums(x)[2:] for x in many]


@given(many=st.lists(tensors(), max_size=6), piece=piece_sizes())
@settings(max_examples=50, deadline=None)
def test_sums_of_squares_are_those_of_float64_and_add_up(many, piece, in_chunks_of):
    with in_chunks_of(piece):
        found = norms.sums_of_squares(many)
    of_each = [reference.finite_sums(x) for x in many]
    assert found[:, 0].tolist() == pytest.approx([row[0] for row in of_each], rel=2e-6)
    assert found[:, 1:].tolist() == [[count, count + bad] for _, _, bad, count in of_each]


def test_a_large_tensor_between_small_ones(in_chunks_of):
    many = [torch.randn(5), torch.randn(300, 7).t(), torch.zeros(0), torch.randn(2, 1).expand(2, 40)]
    with in_chunks_of(64):
        norm = norms.l2_norms(many)
    torch.testing.assert_close(norm, torch.stack([x.double().norm() for x in many]), rtol=1e-13, atol=0)


def test_one_bad_element_spoils_no_other_tensor():
    row = norms.finite_sums([torch.ones(3), torch.tensor([3.0, math.nan, 4.0, -math.inf]), torch.ones(2)])
    right = torch.tensor([[3, 3, 0, 3], [25, 7, 2, 2], [2, 2, 0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(row, right, rtol=1e-14, atol=0)


def test_the_square_of_a_huge_float32_does_not_overflow():
    x = torch.full((100,), 1e38)
    assert norms.l2_norms([x]).item() == pytest.approx(1e39, rel=1e-6)


def test_the_square_of_a_tiny_float32_does_not_vanish():
    assert norms.l2_norms([torch.full((100,), 1e-30)]).item() == pytest.approx(1e-29, rel=1e-6)


def test_float64_beyond_its_own_squares_has_an_infinite_norm():
    x = torch.tensor([1e160, -1.0], dtype=torch.float64)
    assert norms.finite_sums([x]).tolist() == [[math.inf, 1e160, 0, 2]]


def test_no_tensors_give_no_rows():
    assert norms.finite_sums([]).shape == (0, 4)
    assert norms.l2_norms([]).shape == (0,)


def test_tensors_on_two_devices_are_refused():
    with pytest.raises(ValueError, match=r"tensors: got tensors on cpu, meta, takes those of one device; call once"):
        norms.finite_sums([torch.ones(2), torch.ones(2, device="meta")])


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"takes a floating or complex one"):
        norms.l2_norms([torch.ones(2), torch.ones(2, dtype=torch.int32)])


def test_large_float32_is_within_a_millionth_and_small_keeps_its_place():
    many = [torch.randn(300_001), torch.randn(5), torch.full((700, 512), 0.3), torch.zeros(5000)]
    expected = [[x.double().square().sum(), x.double().abs().sum(), 0, x.numel()] for x in many]
    torch.testing.assert_close(norms.finite_sums(many), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(norms.l2_norms(many), torch.stack([x.double().norm() for x in many]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
@pytest.mark.parametrize("shape", [(5,), (300, 1001)])
def test_distances_are_those_of_float64(shape, bad):
    x, y = torch.randn(shape), torch.randn(shape)
    difference = y.double() - x.double()
    if bad is not None:
        x.view(-1)[2] = bad
        difference.view(-1)[2] = 0.0
    count = torch.tensor(x.numel() - (bad is not None), dtype=torch.float64)
    expected = torch.stack((difference.norm(), y.double().norm(), count.sqrt()))
    found = norms.distances([x, torch.ones(2)], [y, torch.full((2,), 4.0)])
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1], torch.tensor([18.0, 32.0, 2.0], dtype=torch.float64).sqrt())


SUBTRACTABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)


@given(many=st.lists(tensors(SUBTRACTABLE), max_size=4), piece=piece_sizes())
@settings(max_examples=50, deadline=None)
def test_distances_are_those_of_each_pair_subtracted_in_its_own_type_or_float32(many, piece, in_chunks_of):
    others = [x.clone().roll(1) for x in many]
    kinds = [torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype for x in many]
    pairs = [(other.to(kind) - x.to(kind), other) for x, other, kind in zip(many, others, kinds, strict=True)]
    roots = [[math.sqrt(len(reference.finite(pair[0])))] for pair in pairs]
    squares = [[math.sqrt(reference.squares(x)) for x in pair] for pair in pairs]
    expected = [x for two, root in zip(squares, roots, strict=True) for x in two + root]
    with in_chunks_of(piece):
        found = norms.distances(many, others)
    assert found.shape == (len(many), 3)
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-13, nan_ok=True)


@pytest.mark.parametrize("everywhere", [False, True], ids=["by torch", "as on a GPU"])
def test_copies_are_the_same_bits_in_memory_of_their_own(everywhere, monkeypatch):
    if everywhere:
        monkeypatch.setattr(norms.fused, "applies_to", lambda x: x.dtype in norms.fused.TYPES)
    kinds = (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32)
    numbers = torch.tensor([-0.0, 1e-40, math.inf, 3.1415927, -2.0])
    tensors = [(numbers * i).to(kind) for i, kind in enumerate(kinds, 1)]
    found = norms.copies(tensors)
    for copy, x in zip(found, tensors, strict=True):
        assert copy.dtype == x.dtype
        assert copy.view(torch.uint8).tolist() == x.view(torch.uint8).tolist()
        assert copy.data_ptr() != x.data_ptr()
