"""What forward passes have given: rows by name, and predictions that still wait for their targets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import ReferenceType

import torch
from torch import Tensor

from torchprobe.capture.predictions.forms import Form, Predicted, members_of
from torchprobe.capture.predictions.pool import InputKey, Pool
from torchprobe.capture.predictions.reading import Reading
from torchprobe.probes.base import Reporter
from torchprobe.probes.evidence import SURE
from torchprobe.statistics import uncertainty
from torchprobe.statistics.dtypes import row_dtype
from torchprobe.statistics.uncertainty import Decomposition

_MAX_WAITING = 16  # passes over one input before their targets are seen


class Tally:
    """Rows by name, added up on their devices. A name is `<form>|<rest>`: the evidence of a form says whether its rows
    count.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[torch.device, str], Tensor] = {}
        self._evidence: dict[str, Tensor] = {}
        self._sampled: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._rows or self._evidence)

    def add(self, name: str, row: Tensor, sampled: bool = False) -> None:
        """Add a row. Out of place: it may have been made in inference mode."""
        key = (row.device, name)
        self._rows[key] = row if key not in self._rows else self._rows[key] + row
        if sampled:
            self._sampled.add(name)

    def describe(self, name: str, *found: Tensor | None) -> None:
        """Add a row of uncertainty: total, aleatoric and epistemic, as far as they are known."""
        self.add(name, uncertainty.compute(Decomposition(*found, *[None] * (3 - len(found)))))

    def support(self, form: str, evidence: Tensor) -> None:
        """Add to what is known of a form: (3,), see `probes.evidence`."""
        before = self._evidence.get(form)
        if before is not None:  # what is in host memory goes to the device: the other way would wait
            device = evidence.device if before.is_cpu else before.device
            dtype = row_dtype(device)
            evidence = before.to(device, dtype, non_blocking=True) + evidence.to(device, dtype, non_blocking=True)
        self._evidence[form] = evidence

    def take_from(self, other: Tally) -> None:
        """All that another one holds, which is empty then."""
        if other is self:
            return
        for (_, name), row in other._rows.items():
            self.add(name, row)
        for form, evidence in other._evidence.items():
            self.support(form, evidence)
        self._sampled |= other._sampled
        other._rows, other._evidence, other._sampled = {}, {}, set()

    def rows(self) -> Iterator[tuple[list[str], Tensor]]:
        """For each device the names and their rows with `EVIDENCE` behind."""
        groups: defaultdict[torch.device, list[str]] = defaultdict(list)
        for device, name in self._rows:
            groups[device].append(name)
        for device, names in groups.items():
            yield names, torch.stack([self._complete(device, name) for name in names])

    def _complete(self, device: torch.device, name: str) -> Tensor:
        row = self._rows[device, name]
        evidence = self._evidence.get(name.partition("|")[0], row.new_zeros(3))
        sampled = row.new_full((1,), float(name in self._sampled))
        return torch.cat((row, evidence.to(device, row_dtype(device), non_blocking=True), sampled))


@dataclass(eq=False)
class Waiting:
    """A prediction whose targets are not known yet. Holds what the rows that are read predict, never the output.

    pool: its own and those of other passes over the same input. output: the plain tensor or the mean, with its
    version; shape: of one sample of it. predicted: by form, of a plain tensor. mean, variance: a number's prediction.
    in_graph: whether its gradient can arrive.
    """

    pool: Pool
    output: ReferenceType[Tensor]
    version: int
    shape: torch.Size
    predicted: dict[Form, Predicted]
    mean: Tensor | None = None
    variance: Tensor | None = None
    in_graph: bool = False
    judged: bool = False


class Moment(NamedTuple):
    """The step, or the validation after it, in which a pass was read: the probes that sample it; whether pictures are
    due.
    """

    step: int
    reporters: tuple[Reporter, ...]
    pictures: bool


@dataclass(eq=False)
class Phase:
    """What one training pass gave, or several over the same input; or all passes of a validation.

    Rows of uncertainty, calibration and interval coverage; pools that may get further passes; predictions that wait.
    unread, cannot_judge: why the last output said nothing, or cannot be judged. note: what else is known of it.
    Gradients that arrive later write into it, so whoever drops it drops what they tell.
    """

    training: bool
    moment: Moment
    uncertainty: Tally = field(default_factory=Tally)
    calibration: Tally = field(default_factory=Tally)
    coverage: Tally = field(default_factory=Tally)
    pools: dict[str, Pool] = field(default_factory=dict)
    waiting: list[Waiting] = field(default_factory=list)
    unjudged: bool = False  # a plain output's targets were never seen
    unread: str = ""
    cannot_judge: str = ""
    note: str = ""

    def wait_for(self, waiting: Waiting) -> None:
        """Targets may follow. In validation nothing tells when they no longer can but the next pass."""
        if not self.training:
            self.forget_waiting()
        self.waiting = [*self.waiting[-_MAX_WAITING + 1 :], waiting]

    def has_judged(self, waiting: Waiting) -> None:
        """Its targets are known, or its backward pass is over: no others will follow."""
        waiting.judged = True
        self.waiting = [other for other in self.waiting if other is not waiting]

    def forget_waiting(self) -> None:
        """No targets will follow."""
        self.unjudged |= bool(self.waiting)
        self.waiting = []

    def pool(self, where: str, key: InputKey) -> Pool | None:
        """What a further pass over the same input adds to."""
        pool = self.pools.get(where)
        return pool if pool is not None and pool.takes(key) else None

    def begin(self, pool: Pool) -> Pool:
        """Another input comes."""
        last = self.pools.get(pool.where)
        if last is not None:
            self.settle_pool(last)
        self.pools[pool.where] = pool
        return pool

    def settle_pool(self, pool: Pool) -> None:
        """No further pass over its input will come."""
        for name, row, sampled in pool.settle():
            self.uncertainty.add(name, row, sampled)

    def settle(self) -> None:
        """No further pass over the same inputs will come."""
        for pool in self.pools.values():
            self.settle_pool(pool)
        self.pools = {}

    def take_from(self, other: Phase) -> None:
        """All rows of another one, which has none then. What was said of the last output counts."""
        other.settle()
        other.forget_waiting()
        self.uncertainty.take_from(other.uncertainty)
        self.calibration.take_from(other.calibration)
        self.coverage.take_from(other.coverage)
        self.unjudged |= other.unjudged
        self.moment = other.moment
        self.unread, self.cannot_judge, self.note = other.unread, other.cannot_judge, other.note

    def absorb(self, other: Phase) -> None:
        """The same, for good: what another one is still told counts here."""
        self.take_from(other)
        other.uncertainty, other.calibration, other.coverage = self.uncertainty, self.calibration, self.coverage

    def describe(self, pool: Pool, reading: Reading, sample_dim: int | None) -> None:
        """Rows of everything but the plain tensor. Numbers with a variance go to the pool: passes belong together."""
        where, tally = pool.where, self.uncertainty
        if reading.named:
            tally.describe(f"{SURE}||{where}", *map(reading.named.get, uncertainty.KINDS))
        if reading.alpha is not None:
            _describe_evidence(tally, where, reading.alpha, reading)
        elif reading.variance is not None and not reading.named:
            _describe_variance(tally, pool, reading.variance, reading, sample_dim)
        for group, values in (("entropy", reading.entropy), ("kl", reading.kl)):
            if values is not None:
                tally.describe(f"{SURE}|{group}|{where}", values)

    def support(self, key: str, evidence: Tensor) -> None:
        """What is known of a form counts for uncertainty and for calibration."""
        self.uncertainty.support(key, evidence)
        self.calibration.support(key, evidence)

    def settle_form(self, key: str, right: bool, certain: Tensor | None = None) -> None:
        """A loss has told whether an output has this form. certain: a flag on the device, where it may not have."""
        evidence = torch.tensor([1.0, float(right), 0.0], dtype=torch.float64, device="cpu")
        if certain is not None:
            evidence = evidence.to(certain.device, row_dtype(certain.device), non_blocking=True) * certain
        self.support(key, evidence)


def _describe_evidence(tally: Tally, where: str, alpha: Tensor, reading: Reading) -> None:
    if reading.nu is not None and reading.beta is not None:
        tally.describe(f"{SURE}||{where}", *uncertainty.normal_inverse_gamma(reading.nu, alpha, reading.beta))
    elif alpha.dim() and alpha.shape[-1] > 1:
        tally.describe(f"{SURE}||{where}", *uncertainty.dirichlet(alpha))
        tally.describe(f"{SURE}|vacuity|{where}", uncertainty.vacuity(alpha))


def _describe_variance(tally: Tally, pool: Pool, variance: Tensor, reading: Reading, sample_dim: int | None) -> None:
    spread = reading.spread_of_means
    if spread is not None:  # a mixture tells its parts itself
        tally.describe(f"{SURE}||{pool.where}", variance, variance - spread, spread)
    elif reading.mean is not None:
        pool.add_numbers(SURE, members_of(reading.mean, sample_dim), members_of(variance, sample_dim))
    else:
        tally.describe(f"{SURE}||{pool.where}", variance, variance)
