"""What forward passes have given: rows by name, and predictions that still wait for their targets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import ReferenceType

import torch
from torch import Tensor

from torchprobe.capture.predictions.forms import Form, Predicted, members_of
from torchprobe.capture.predictions.graph import Place
from torchprobe.capture.predictions.inputs import InputKey
from torchprobe.capture.predictions.pool import Pool
from torchprobe.capture.predictions.reading import Quantity, Reading
from torchprobe.capture.predictions.targets import Spread
from torchprobe.probes.base import Reporter
from torchprobe.probes.evidence import SURE
from torchprobe.statistics import uncertainty
from torchprobe.statistics.dtypes import row_dtype
from torchprobe.statistics.uncertainty import Decomposition

EVIDENTIAL = "evidential"  # the form of a field that may hold the parameters of a Dirichlet distribution
QUANTITIES: tuple[Quantity, ...] = ("total", "aleatoric", "epistemic")
_MAX_WAITING = 16  # passes over one input before their targets are seen


class Tally:
    """Rows by name, added up on their devices. `<form>|<rest>`: the evidence of a form says whether its rows count."""

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

    def describe(self, name: str, *found: Tensor | None, among: Tensor | None = None) -> None:
        """Add a row of uncertainty: total, aleatoric and epistemic, as far as they are known, of some examples."""
        self.add(name, uncertainty.compute(Decomposition(*found, *[None] * (3 - len(found))), among))

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
        rows, evidence, sampled = other.hand_over()
        for (_, name), row in rows.items():
            self.add(name, row, name in sampled)
        for form, found in evidence.items():
            self.support(form, found)

    def hand_over(self) -> tuple[dict[tuple[torch.device, str], Tensor], dict[str, Tensor], set[str]]:
        """Everything, to somebody else."""
        given = self._rows, self._evidence, self._sampled
        self._rows, self._evidence, self._sampled = {}, {}, set()
        return given

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


class Candidate(NamedTuple):
    """Targets that a loss module was called with, row by row, for the gradient to confirm; flags: see `matching`."""

    form: Form
    targets: Tensor
    weight: Tensor | None
    smoothing: float
    reduced: bool
    own: Tensor | None
    certain: Tensor | None = None


class Values(NamedTuple):
    """A prediction of numbers, detached, by the key of the way in which it is read."""

    key: str
    mean: Tensor
    variance: Tensor
    spread: Spread
    is_normal: bool


@dataclass(eq=False)
class Waiting:
    """A prediction whose targets are not known yet. Holds what the rows that are read predict, never the output.

    pool: its own and those of other passes over the same input; number: of this pass among those. output: the plain
    tensor or the mean, with its version; shape: of one sample of it; place: in the graph. predicted: by form, of a
    plain tensor. numbers: a number's prediction, in each way to read it. candidates: what loss modules were called
    with. in_graph: whether its gradient can arrive.
    """

    pool: Pool
    output: ReferenceType[Tensor]
    version: int
    shape: torch.Size
    predicted: dict[Form, Predicted]
    numbers: Sequence[Values] = ()
    place: Place | None = None
    number: int = 1
    in_graph: bool = False
    judged: bool = False
    candidates: list[Candidate] = field(default_factory=list)

    def enter_graph(self) -> None:
        """Its gradient may arrive."""
        self.in_graph = True

    def close(self) -> None:
        """No other targets are wanted."""
        self.judged = True


class Moment(NamedTuple):
    """The step, or validation after it, in which a pass was read: probes that sample it; whether pictures are due."""

    step: int
    reporters: tuple[Reporter, ...]
    pictures: bool


@dataclass(eq=False)
class Phase:
    """What one training pass gave, or several over the same input; or all passes of a validation.

    Rows of uncertainty, calibration and interval coverage; pools that may get further passes; predictions that wait.
    lines: by probe, why the last output says nothing, or only a part. note: what else is known of it. outputs: names of
    all outputs, where there are several; heads: what the others than the first gave.
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
    lines: dict[str, str] = field(default_factory=dict)
    note: str = ""
    outputs: tuple[str, ...] = ()
    heads: dict[str, Phase] = field(default_factory=dict)

    def head(self, name: str) -> Phase:
        """What another output gave than the first."""
        return self.heads.setdefault(name, Phase(self.training, self.moment))

    def say(self, probe: str, line: str) -> None:
        """Why there is nothing to record of an output, and what would settle it."""
        if line:
            self.lines[probe] = line

    def describe_as(self, note: str, outputs: Iterable[str]) -> None:
        """What else is known of the last output, and of which ones it consisted."""
        self.note, self.outputs = note, tuple(outputs)

    def wait_for(self, waiting: Waiting) -> None:
        """Targets may follow. In validation nothing tells when they no longer can but the next pass."""
        if not self.training:
            self.forget_waiting()
        self.waiting = [*self.waiting[-_MAX_WAITING + 1 :], waiting]

    def has_judged(self, waiting: Waiting) -> None:
        """Its targets are known, or its backward pass is over: no others will follow."""
        waiting.close()
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

    def go_on(self, pool: Pool) -> Pool:
        """Its pass, or another one, has come."""
        return pool if self.pools.get(pool.where) is pool else self.begin(pool)

    def all_outputs(self) -> list[Phase]:
        """This, and what the other outputs gave."""
        return [self, *self.heads.values()]

    def settle_pool(self, pool: Pool) -> None:
        """No further pass over its input will come."""
        for name, row, sampled in pool.settle():
            self.uncertainty.add(name, row, sampled)

    def settle(self) -> None:
        """No further pass over the same inputs will come."""
        for pool in self.pools.values():
            self.settle_pool(pool)
        self.pools = {}
        for head in self.heads.values():
            head.settle()

    def take_from(self, other: Phase) -> None:
        """All rows of another one, which has none then. What was said of the last output counts."""
        other.settle()
        other.forget_waiting()
        self.uncertainty.take_from(other.uncertainty)
        self.calibration.take_from(other.calibration)
        self.coverage.take_from(other.coverage)
        self.unjudged |= other.unjudged
        self.moment, self.note, self.outputs = other.moment, other.note, other.outputs
        self.lines.update(other.lines)
        for name, head in other.heads.items():
            self.head(name).take_from(head)

    def absorb(self, other: Phase) -> None:
        """The same, for good: what another one is still told counts here."""
        self.take_from(other)
        other.tell(self)

    def tell(self, other: Phase) -> None:
        """What comes from now on goes to another one."""
        self.uncertainty, self.calibration, self.coverage = other.uncertainty, other.calibration, other.coverage
        for name, head in self.heads.items():
            head.tell(other.head(name))

    def describe(self, pool: Pool, reading: Reading, sample_dim: int | None) -> None:
        """Rows of everything but the plain tensor. Numbers with a variance go to the pool: passes belong together."""
        where, tally = pool.where, self.uncertainty
        if reading.named:
            tally.describe(f"{SURE}||{where}", *map(reading.named.get, QUANTITIES), among=reading.among)
        if reading.alpha is not None:
            _describe_evidence(tally, where, reading.alpha, reading)
        for number in () if reading.named or reading.alpha is not None else reading.numbers:
            if number.mean is None:
                tally.describe(f"{number.key}||{where}", number.variance, number.variance)
            else:
                both = (members_of(x, sample_dim) for x in (number.mean, number.variance))
                pool.add_numbers(number.key, *both)
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
    key = SURE if reading.evidence is None else EVIDENTIAL
    if reading.nu is not None and reading.beta is not None:
        tally.describe(f"{key}||{where}", *uncertainty.normal_inverse_gamma(reading.nu, alpha, reading.beta))
    elif alpha.dim() and alpha.shape[-1] > 1:
        tally.describe(f"{key}||{where}", *uncertainty.dirichlet(alpha))
        tally.describe(f"{key}|vacuity|{where}", uncertainty.vacuity(alpha))
