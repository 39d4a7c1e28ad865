"""Whether rows belong to one loss, and of how many it is the mean: against a slow account in Python's own numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torchprobe.capture.predictions.trust import CLOSE, STEADY, Count, counted, is_steady

FACTORS = st.one_of(st.floats(1e-6, 1e6), st.just(1.0))
ROWS = st.lists(st.tuples(FACTORS, st.booleans(), st.integers(-1, 3)), min_size=1, max_size=40)


def steady_twin(rows: list[tuple[float, bool, int]], common: float, tolerance: float) -> tuple[bool, bool]:
    """The answer, and whether it hangs on rounding."""
    fine = [(factor, max(target, 0)) for factor, good, target in rows if good]
    if not fine:
        return False, False
    margins = [abs(factor - common) - tolerance * common for factor, _ in fine]
    equal = sum(margin <= 0 for margin in margins)
    by_class = {target: [f for f, t in fine if t == target] for _, target in fine}
    means = {target: math.fsum(some) / len(some) for target, some in by_class.items()}
    spread = [abs(factor - means[target]) - tolerance * means[target] for factor, target in fine]
    alike = sum(margin <= 0 for margin in spread)
    repeated = sum(len(some) - 1 for some in by_class.values())
    classes = alike >= 0.9 * len(fine) and repeated >= 8 and 2 * repeated >= len(fine)
    close = any(abs(m) <= 1e-9 * common for m in margins) or any(
        abs(m) <= 1e-9 * means[t] for m, (_, t) in zip(spread, fine, strict=True)
    )
    return equal >= 0.9 * len(fine) or classes, close


@settings(deadline=None)
@given(ROWS, FACTORS, st.sampled_from([STEADY, 1e-3, 0.3]), st.booleans())
def test_one_factor_for_all_rows_or_one_for_each_class(rows, common, tolerance, near):
    if near:  # all but the same factor
        rows = [(common * (1 + 1e-4 * (i % 3)), good, target) for i, (_, good, target) in enumerate(rows)]
    expected, close = steady_twin(rows, common, tolerance)
    factor, fine, targets = (torch.tensor(column) for column in zip(*rows, strict=True))
    found = is_steady(factor.double(), fine, targets, torch.tensor(common, dtype=torch.float64), tolerance)
    assert close or bool(found) == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_factor_that_is_no_number_is_no_row_of_the_loss(bad):
    factor = torch.tensor([bad] * 2 + [0.25] * 18)
    found = is_steady(factor, torch.ones(20, dtype=torch.bool), torch.zeros(20, dtype=torch.long), factor[-1], STEADY)
    assert bool(found)  # 18 of 20 are nine tenths
    factor[2] = bad
    assert not is_steady(factor, torch.ones(20, dtype=torch.bool), torch.arange(20), torch.tensor(0.25), STEADY)


def count(factor: float, alive: int, zeros: int, rows: int) -> Count:
    numbers = (torch.tensor(float(x), dtype=torch.float64) for x in (factor, alive, zeros))
    return Count(*numbers, rows, CLOSE)


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(0, 50), st.integers(0, 12), st.sampled_from([1, 3, 5, 15]))
@example(181, 13, 4, 15)  # 16 / 15 over all rows is 0.5 % off a mean over those with a gradient
def test_rows_without_a_gradient_count_where_the_mean_is_over_them_too(alive, zeros, octaves, odd):
    """A mean over all rows, in `odd` micro-batches, times a power of two of a loss scale."""
    scale = Fraction(2**octaves, odd)
    found = count(float(scale / (alive + zeros)), alive, zeros, alive + zeros)
    assert bool(found.is_usual)
    if scale == 1:
        assert bool(found.zeros_count)
        assert bool(found.is_known)
        assert bool(found.is_plain)
    other = scale * Fraction(alive, alive + zeros)
    if bool(found.is_known) and not bool(found.zeros_count):  # only where the count without them is as likely
        assert _is_natural(float(other))
        assert scale != 1


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 50), st.integers(0, 12), st.sampled_from([1, 3, 5, 15]))
@example(300, 1, 0, 1)  # all rows are 0.3 % off
@example(196, 14, 4, 15)  # a mean over all rows is 0.4 % off
def test_rows_without_a_gradient_do_not_count_where_the_mean_leaves_them_out(alive, zeros, octaves, odd):
    scale = Fraction(2**octaves, odd)
    found = count(float(scale / alive), alive, zeros, alive + zeros)
    if scale == 1 and alive not in (15 * zeros, 7 * zeros, 3 * zeros, zeros):
        assert bool(found.is_known)
    if bool(found.zeros_count):
        assert _is_natural(float(scale * Fraction(alive + zeros, alive)))


@settings(deadline=None)
@given(st.floats(1e-5, 1e5), st.integers(1, 300), st.integers(0, 30))
def test_a_factor_is_plain_or_usual_as_fractions_say(factor, alive, zeros):
    rows = alive + zeros
    products = [factor * rows, factor * alive]
    if any(abs(abs(x - 1) - CLOSE) < 1e-9 for x in (*products, factor)) or any(map(_is_close_call, products)):
        return
    found = count(factor, alive, zeros, rows)
    assert bool(found.is_plain) == any(abs(x - 1) <= CLOSE for x in (*products, factor))
    assert bool(found.is_usual) == any(map(_is_natural, products))


@pytest.mark.parametrize("known", [40, 30])
def test_rows_count_by_what_parts_those_with_a_gradient_from_others(known):
    loss, given = torch.randn(40).square(), torch.arange(40) < known
    order = loss.where(given, -1.0).argsort(descending=True)

    def of(rows: torch.Tensor) -> torch.Tensor:
        return torch.zeros(40, dtype=torch.bool).index_fill_(0, rows, True)

    for many in (12, known - 9):  # the hardest, and all but a few easy ones
        assert torch.equal(counted(loss, of(order[:many]), given), given)
    easiest = of(order[8:known])  # or all but some padding, which no training made sure
    assert torch.equal(counted(loss, easiest, given), easiest)
    padding = torch.where(of(order[12:known]), loss.where(given, torch.inf).amin(), loss)
    assert not counted(padding, of(order[:12]), given).any()
    assert not counted(loss, of(order[: known - 1]), given).any()  # one is left out, which happens to be the easiest
    for mask in (of(order[:known:2]), given, given & (loss > loss.median()) | of(order[known - 2 : known - 1])):
        assert torch.equal(counted(loss, mask, given), mask)


def _misses(x: float) -> list[float]:
    return [abs(math.log2(x * odd) - round(math.log2(x * odd))) for odd in range(1, 16, 2)]


def _is_natural(x: float) -> bool:
    return min(_misses(x)) <= CLOSE / 5


def _is_close_call(x: float) -> bool:
    return any(abs(miss - CLOSE / 5) < 1e-9 for miss in _misses(x))
