"""Whether rows that each look like a cross-entropy's are those of one loss, and how many rows it is the mean of.

A row alone fits every loss that chooses a class, a policy's too; its factor s tells them apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torchprobe.capture.predictions.forms import IGNORED, Form, Predicted, row_count
from torchprobe.capture.predictions.gradient import Given, Recovered, recover
from torchprobe.capture.predictions.graph import Judge
from torchprobe.capture.predictions.phase import Waiting
from torchprobe.capture.predictions.pool import ClassMembers, Refuse, Seen

STEADY = 1e-2
"""By which share factors of the rows of one loss may differ."""

CLOSE = 5e-3
"""By which a whole number may be missed."""

_ENOUGH = 0.9  # of the rows
_ODD = 1, 16, 2  # a range: 1, 3, ... 15
_CHANCE = 14.0  # nats: one in a million
_DISTINCT = 1e-3  # nats, of two losses
_LEAST_AGREEMENT = 8  # rows of a class beyond the first, in all


class Count(NamedTuple):
    """How many rows a mean was taken over, 1 / s, against those with a gradient and those whose may have been lost."""

    factor: Tensor
    alive: Tensor
    zeros: Tensor
    rows: int
    tolerance: float

    @property
    def zeros_count(self) -> Tensor:
        """Whether rows without a gradient are among those that count."""
        own, other = self._scales
        scaled = ~self._is_one(other) & self._is_natural(own) & ~self._is_natural(other) & ~self._is_between
        return (self._is_likelier(own, other) & ((own - 1).abs() <= (other - 1).abs())) | scaled

    @property
    def is_known(self) -> Tensor:
        """Whether that is told at all."""
        own, other = self._scales
        ignored = self._is_natural(other) & ~self._is_natural(own) & ~self._is_between
        return self.zeros_count | self._is_likelier(other, own) | ignored

    @property
    def is_plain(self) -> Tensor:
        """Whether the factor is that of a mean, or of a sum, that nothing was multiplied with."""
        own, other = self._scales
        rows = self._is_one(own) | self._is_one(other)
        return rows | self._is_one(self.factor) | self._is_one(self.factor * self.rows)

    @property
    def is_usual(self) -> Tensor:
        """The same, or one that micro-batches or a loss scale divide or multiply."""
        own, other = self._scales
        return self._is_natural(own) | self._is_natural(other)

    @property
    def _is_between(self) -> Tensor:
        """Whether it is a mean over more rows than have a gradient, and over fewer than there are: some count."""
        own, other = self._scales
        return (own > 1 + self.tolerance) & (other < 1 - self.tolerance)

    @property
    def _scales(self) -> tuple[Tensor, Tensor]:
        return self.factor * (self.alive + self.zeros), self.factor * self.alive

    def _is_one(self, x: Tensor) -> Tensor:
        return (x - 1).abs() <= self.tolerance

    def _is_likelier(self, x: Tensor, than: Tensor) -> Tensor:
        """Whether x is 1, and not by a chance that the other one, exact where x is not, explains."""
        return self._is_one(x) & (self._is_natural(x) | ~self._is_natural(than))

    def _is_natural(self, x: Tensor) -> Tensor:
        """A power of two over a small odd number."""
        octaves = (x * torch.arange(*_ODD, device=x.device)).log2()  # no copy from the host, few kernels
        return ((octaves - octaves.round()).abs() <= self.tolerance / 5).any()


def is_trusted(judge: Judge, steady: Tensor, count: Count) -> Tensor:
    """A flag: whether this is what the graph says, or what no other loss is likely to be."""
    if judge.kind == "whole":
        return torch.ones_like(steady)
    if judge.kind == "also":
        return steady
    if judge.mixed:
        return torch.zeros_like(steady)
    if judge.kind == "blind":
        return steady & (count.is_usual | count.is_plain)
    return steady & count.is_plain


def is_steady(factor: Tensor, fine: Tensor, targets: Tensor, common: Tensor, tolerance: float) -> Tensor:
    """A flag: whether one factor is that of nearly all rows, or one for each class, of enough rows of a class."""
    equal = fine & ((factor - common).abs() <= tolerance * common)
    classes = targets.clamp(min=0)
    size = int(classes.numel()) + 1
    slot = classes % size  # classes that share a slot only make it stricter
    sums, counts = (
        factor.new_zeros(size).index_add_(0, slot, x.to(factor.dtype)) for x in (factor.where(fine, 0.0), fine)
    )
    mean = (sums / counts.clamp(min=1))[slot]
    alike = fine & ((factor - mean).abs() <= tolerance * mean)
    repeated, rows = (counts - 1).clamp(min=0).sum(), fine.sum()
    by_class = (alike.sum() >= _ENOUGH * rows) & (repeated >= _LEAST_AGREEMENT) & (2 * repeated >= rows)
    return (rows > 0) & ((equal.sum() >= _ENOUGH * rows) | by_class)


# ---- of several predictions that share a loss


def choices(waiting: Waiting, form: Form, seen: Seen, refuse: Refuse) -> Iterator[Tensor]:
    """Flags: whether a loss chose by its value among passes, outputs, or predictions of an example: what is left of
    each is no sample of its predictions.
    """
    first = waiting.pool.first(form, seen)
    if first is not None:
        waiting.pool.part(_have_other_targets(first, seen))
        yield _have_other_rows(first, seen)
    for other, refuse_other in waiting.pool.of_others(form, seen, refuse):
        flag = _are_best_of_two(other, seen)
        refuse_other(flag)
        yield flag
    each = row_count(waiting.shape, form) // waiting.shape[0]
    if each > 1 and form.kind == "softmax" and not waiting.pool.by_place and not waiting.pool.sampled(form):
        yield _are_best_of_each(seen, each)


def are_hardest(found: Recovered, predicted: Predicted, judge: Judge) -> Tensor:
    """A flag: whether rows without a gradient may have been left out for their small loss: the graph says so, or none
    of the others has as small a loss as these would have at least, which hardly is chance.
    """
    p, targets, alive = predicted.mean, found.targets.amax(0), found.alive.any(0)
    if judge.selected or judge.kind == "whole":
        return torch.full_like(alive[:1].any(), judge.selected)
    left = ~alive & ~found.faint.all(0)
    floor = p.amax(-1).where(left, torch.inf).amin()
    given = p.gather(-1, targets.clamp(min=0)[:, None])[:, 0].where(alive & (targets >= 0), 0.0)
    share = p.where(p <= floor, 0.0).sum(-1).clamp(torch.finfo(p.dtype).tiny, 1).log()
    return left.any() & (given <= floor).all() & (share.where(alive, 0.0).sum() < -_CHANCE / 2)


def counted(loss: Tensor, alive: Tensor, known: Tensor) -> Tensor:
    """Flags: rows that count, by their losses: those with a gradient; all where the others have smaller losses, and
    hardly by chance; none where it may be either. Padding often has one loss, which is one chance.
    """
    given, left = known & alive, known & ~alive
    k, others = given.sum(), (loss.where(left, -torch.inf).sort().values.diff() > _DISTINCT).sum()
    ways = torch.lgamma(k + others + 1.0) - torch.lgamma(k + 1.0) - torch.lgamma(others + 1.0)
    smaller = loss.where(given, torch.inf).amin() >= loss.where(left, -torch.inf).amax()
    return torch.where(smaller & left.any(), known & (ways > _CHANCE), alive)


def have_one_target(targets: Tensor, each: int, index: Tensor | None) -> Tensor:
    """A flag: whether all predictions of an example, so many of each, have one target, each example its own, as those
    of members have.
    """
    rows = torch.arange(len(targets), device=targets.device) if index is None else index
    example = rows.div(each, rounding_mode="floor")
    known = (targets[1:] != IGNORED) & (targets[:-1] != IGNORED)
    within, differ = example[1:] == example[:-1], known & (targets[1:] != targets[:-1])
    return (known & within).any() & ~(differ & within).any() & (differ & ~within).any()


def _have_other_rows(a: Seen, b: Seen) -> Tensor:
    """A flag: whether a loss leaves out other rows of one pass than of another, as the best of them does."""
    return ((a.alive != b.alive) & ~(a.faint | b.faint)).any()


def _have_other_targets(a: Seen, b: Seen) -> Tensor:
    """A flag: whether two passes over one input were asked for different things: two tasks."""
    known = (a.targets >= 0) & (b.targets >= 0)
    return (known & (a.targets != b.targets)).sum() > (1 - _ENOUGH) * known.sum()


def _are_best_of_two(a: Seen, b: Seen) -> Tensor:
    """A flag: whether each row counts of one output alone, always of the one that is better at it, or always of the
    worse. Outputs for rows of their own are so by chance once in 2 ** rows.
    """
    if a.predicted.shape != b.predicted.shape:
        return torch.zeros_like(a.alive[:1].any())
    apart = ~(a.alive & b.alive).any() & a.alive.any() & b.alive.any()
    ahead = [_ahead(one, other) for one, other in ((a, b), (b, a))]
    flags = [torch.stack([(sign * x >= 0).all() for x in ahead]).all() for sign in (1, -1)]
    return apart & torch.stack(flags).any()


def _ahead(one: Seen, other: Seen) -> Tensor:
    """By how much one gives its targets more than the other; 0 of rows without."""
    target, known = one.targets.clamp(min=0)[:, None], one.alive & (one.targets >= 0)
    return (one.predicted - other.predicted).gather(-1, target)[:, 0].where(known, 0.0)


def _are_best_of_each(seen: Seen, each: int) -> Tensor:
    """A flag: whether one prediction of every example counts, now this one and now that, always the best or worst."""
    alive, p = seen.alive.view(-1, each), seen.predicted.view(-1, each, seen.predicted.shape[-1])
    target = seen.targets.view(-1, each).amax(-1).clamp(min=0)
    given = p.gather(-1, target[:, None, None].expand(-1, each, 1))[..., 0]
    chosen = alive.to(torch.uint8).argmax(-1)
    own = given.gather(-1, chosen[:, None])[:, 0]
    extreme = torch.stack([(own >= given.amax(-1)).all(), (own <= given.amin(-1)).all()]).any()
    return (alive.sum(-1) == 1).all() & (chosen != chosen[:1]).any() & extreme


def of_passes(
    found: Recovered, given: Given, members: ClassMembers, last: float
) -> Iterator[tuple[Recovered, Given, Tensor, float]]:
    """What the gradient is when several passes share a loss, the prediction that is judged then, and how often.

    last: 1.0 at the last pass, when all have a gradient: one prediction of all passes counts once.
    """
    assert members.of_mean_logits is not None
    predicted, samples = given.predicted, len(given.g)
    passes = members.count / samples
    # Each row's factor as before a mean over so many passes: of each pass's own loss, or of one at the mean.
    yield found._replace(factor=found.factor * passes), given, predicted.mean, 1.0
    each = members.of_mean_logits[None].expand(samples, -1, -1)
    at_mean = given._replace(predicted=Predicted(each, each, predicted.largest, torch.zeros_like(predicted.already)))
    again = recover(*at_mean)
    yield again._replace(factor=again.factor * passes), at_mean, members.mean, last
    if samples == 1:
        yield _without_share(found, predicted.mean, members), given, members.mean, last


def _without_share(found: Recovered, p: Tensor, members: ClassMembers) -> Recovered:
    """Each row's factor times what all passes give its target, over what this one does: 1 / n for all of n rows."""
    target = found.targets[0].clamp(min=0)[:, None]
    share = p.gather(-1, target) / (members.mean.gather(-1, target) * members.count)
    return found._replace(factor=found.factor / share[:, 0])
