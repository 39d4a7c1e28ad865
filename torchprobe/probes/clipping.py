"""The gradient norm before clipping: what a backward pass left is compared with what the optimizer used."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from torchprobe.probes.base import Probe, Reporter
from torchprobe.records import Value
from torchprobe.statistics import norms

Array: TypeAlias = "NDArray[np.float64]"
Chosen: TypeAlias = "NDArray[np.bool_] | NDArray[np.intp]"

_SAME = 1e-6  # of a sum: no change
_ROUNDING = 1e-5  # of a factor, by which float32 is multiplied
_APART = 1e-3  # of a norm: surely another one
_LARGE = 1e-6  # a sum of squares that no factor makes 0
_EPSILON = 1e-6  # that torch adds to a norm before it divides by it
_KEPT = 8  # limits of earlier steps

_UNSEEN = "no backward pass was seen to end before the optimizer stepped"
_GONE = "a gradient was taken away after the backward pass"
_BETWEEN = "gradients were changed between two backward passes of a step"
_APART_FROM = "a pipeline's schedule gives parameters their gradients after the backward pass of a stage"
_TWICE = "all gradients were changed in more than one operation, which clipping alone does not do"
_OTHER = (
    "gradients were changed by something else than clipping after the backward pass; where that was another backward "
    "pass, which does not run through the model's output (a penalty's own), overview/loss is without it"
)
_YET = "gradients were multiplied by a factor after the backward pass, and nothing showed yet that it was clipping"
_FACTOR = "gradients were multiplied by a factor after the backward pass, and nothing shows that it was clipping"


class Changes(NamedTuple):
    """Of each gradient, in the columns of a row: sums as left and as used, shape (n, 4) each, as `norms.FIELDS` says.

    largest: magnitude that is used. touched: 1 where it changed between two backward passes, 2 where others put it into
    place. operations: that changed it in place after the last one, as far as torch counts them. resolution: relative
    step of its type. What no backward pass was seen to leave is NaN, and so is what the optimizer did not use.
    """

    left: Array
    used: Array
    largest: Array
    touched: Array
    operations: Array
    resolution: Array

    @classmethod
    def of(cls, rows: Array) -> Changes:
        """Of rows as they come from the device, shape (n, 12)."""
        left, used, beside = np.split(rows, [norms.WIDTH, 2 * norms.WIDTH], axis=1)
        return cls(left, used, *beside.T)

    def at(self, chosen: Chosen) -> Changes:
        """Those of some gradients."""
        return Changes(*(column[chosen] for column in self))

    @property
    def width(self) -> Array:
        """By what factors that should be equal may differ, relative to them."""
        return np.maximum(_ROUNDING, self.resolution)


class End(NamedTuple):
    """Where some gradients end that were multiplied by one factor: norm and largest magnitude, and the norm before."""

    norm: float
    largest: float
    before: float
    width: float

    @classmethod
    def of(cls, some: Changes) -> End:
        """All of these together."""
        norm, before = (math.sqrt(sums[:, 0].sum()) for sums in (some.used, some.left))
        width = float(some.width.max()) + (_EPSILON / before if before else 0.0)
        return cls(norm, float(some.largest.max()), before, width)

    def is_at(self, limits: Iterable[float]) -> bool:
        """Whether it is a limit that is known, or one as people write them."""
        near = any(abs(end - limit) <= self.width * limit for limit in limits for end in (self.norm, self.largest))
        return near or is_short(self.norm, self.width) or is_short(self.largest, self.width)

    def is_like(self, others: Iterable[End]) -> bool:
        """Whether another one ends there too that came from elsewhere."""
        apart = [other for other in others if abs(other.before - self.before) > (_APART + self.width) * self.before]
        ends = [pair for other in apart for pair in ((other.norm, self.norm), (other.largest, self.largest))]
        return any(abs(theirs - mine) <= self.width * mine for theirs, mine in ends)


class Judge:
    """Whether gradients were clipped between backward pass and optimizer, as far as their sums tell.

    Clipping by norm multiplies some gradients by one factor up to a limit, of their L2 norm or largest magnitude: a
    number of two digits, or one that other gradients or an earlier step end at too, whatever they began with. Without
    a limit a common factor counts once a step has left all gradients as they were: then no constant scales them.
    Clipping by value leaves small gradients as they are and gives others one largest magnitude, the limit. Anything
    else is no clipping. What keeps both sums of each gradient, such as other signs, is no change here.
    """

    def __init__(self) -> None:
        self._plain = False  # a step has left all as it was
        self._ends: list[End] = []
        self._doubts = 0

    def __call__(self, changes: Changes) -> tuple[bool | None, str]:
        """Whether they were clipped; None where that is not known, with the reason."""
        reason = _unjudged(changes)
        if reason:
            return None, reason
        same = np.all(np.abs(changes.left - changes.used)[:, :2] <= _SAME * changes.left[:, :2], axis=1)
        if same.all():
            self._plain = True
            return False, ""
        return self._of_changed(changes.at(~same), all_are=not changes.left[same, 0].any())

    def _of_changed(self, changed: Changes, all_are: bool) -> tuple[bool | None, str]:
        if ((changed.used[:, 0] == 0) & (changed.left[:, 0] > _LARGE)).any():
            return None, _GONE
        with np.errstate(divide="ignore", invalid="ignore"):
            factor, of_sum = np.sqrt(changed.used[:, 0] / changed.left[:, 0]), changed.used[:, 1] / changed.left[:, 1]
        if not ((factor < 1 + changed.width) & (of_sum < 1 + changed.width)).all():
            return None, _OTHER
        scaled = np.abs(factor - of_sum) <= changed.width * factor
        limits = _value_limits(changed.at(~scaled))
        if limits is None:
            return None, _OTHER
        multiplied = changed.at(scaled)
        if all_are and scaled.all() and multiplied.operations.max() > 1 and not self._plain:
            return None, _TWICE
        return self._of_factors([End.of(multiplied.at(run)) for run in _runs(factor[scaled], multiplied.width)], limits)

    def _of_factors(self, ends: Sequence[End], limits: Sequence[float]) -> tuple[bool | None, str]:
        others = [*self._ends, *ends]
        self._ends = others[-_KEPT:]
        if self._plain or all(end.is_at(limits) or end.is_like(others) for end in ends):
            return True, ""
        self._doubts += 1
        return None, _FACTOR if self._doubts > 1 else _YET


class ChangesReporter(Reporter):
    """`overview/grad_norm_unclipped` and `overview/clipped_fraction`, where nothing but clipping changed gradients."""

    def __init__(self, probe: Probe) -> None:
        super().__init__(probe)
        self.source = "changes"
        self._judge = Judge()
        self._judged = self._clipped = 0

    def combine_rows(self, a: Array, b: Array) -> Array:
        """Of two parts of a gradient: sums, and behind them what is the largest of both."""
        sums = 2 * norms.WIDTH
        return np.concatenate((a[..., :sums] + b[..., :sums], np.maximum(a[..., sums:], b[..., sums:])), axis=-1)

    def report_all(self, names: Sequence[str], rows: Array) -> Iterator[tuple[str, Value]]:
        """The total norm that was left, and the share of sampled steps so far in which it was clipped.

        NaN and inf leave nothing to compare: then the norm is that of what is finite, and the step does not count.
        """
        changes = Changes.of(np.stack([*dict(zip(names, rows, strict=True)).values()]))
        total = norms.l2_norm(changes.left.sum(0).tolist())
        if changes.left[:, 2].any() and not np.isnan(changes.left).any():
            yield "overview/grad_norm_unclipped", total
            return
        clipped, reason = self._judge(changes)
        if clipped is None:
            level = logging.INFO if reason is _YET else logging.WARNING
            self.remark(f"overview/grad_norm_unclipped is left out where {reason}", level)
            return
        self._judged, self._clipped = self._judged + 1, self._clipped + clipped
        yield "overview/grad_norm_unclipped", total
        yield "overview/clipped_fraction", self._clipped / self._judged


def is_short(number: float, width: float) -> bool:
    """Whether it is a decimal number of at most two digits, one where the width is that of half precision."""
    if not 0 < number < math.inf or width > _APART * 10:
        return False
    digits = 2 if width < _APART else 1
    unit = 10.0 ** (math.floor(math.log10(number * (1 + width))) - digits + 1)
    return abs(round(number / unit) * unit - number) <= width * number


def _unjudged(changes: Changes) -> str:
    """Why nothing can be said, if so."""
    if (changes.touched > 1).any():
        return _APART_FROM
    if np.isnan(changes.left).any():
        return _UNSEEN
    if np.isnan(changes.used).any():
        return _GONE
    if changes.touched.any():
        return _BETWEEN
    return _OTHER if changes.used[:, 2].any() else ""


def _value_limits(clamped: Changes) -> list[float] | None:
    """The limits of gradients that were clipped by value, none for none of them; None where it was something else."""
    lost, left, limit = clamped.left - clamped.used, clamped.left, clamped.largest
    noise = clamped.width * (left[:, 0] + 2 * limit * left[:, 1])
    if (lost[:, 0] < 2 * limit * lost[:, 1] - noise).any():  # an element above the limit loses more squares than that
        return None
    found = [clamped.at(run) for run in _runs(limit, np.maximum(_SAME, clamped.resolution))]
    limits = [(float(one.largest[0]), max(_SAME, float(one.resolution[0]) / 2), len(one.largest)) for one in found]
    known = all(several > 1 or is_short(limit, width) for limit, width, several in limits)
    return [limit for limit, _, _ in limits] if known else None


def _runs(values: Array, width: Array) -> list[NDArray[np.intp]]:
    """Where values are that are equal to within their relative width."""
    order = np.argsort(values)
    ordered = values[order]
    apart = np.diff(ordered) > width[order][1:] * ordered[1:]
    return [run for run in np.split(order, np.flatnonzero(apart) + 1) if len(run)]
