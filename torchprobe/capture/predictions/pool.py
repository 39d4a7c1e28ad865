"""Passes over the same input, put together: whether they are such, and running sums over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from torchprobe.capture.predictions.forms import Form, Generators, Predicted, pick, rows_of
from torchprobe.capture.predictions.inputs import InputKey
from torchprobe.statistics import uncertainty
from torchprobe.statistics.dtypes import row_dtype
from torchprobe.statistics.uncertainty import Decomposition, entropy

NUMBERS = "numbers"
"""The form of a plain output that holds numbers: told by a loss module, or by `task=`."""

_MOST_NUMBERS = 2**20
_SAME = 1e-6  # probabilities that lie no further apart are those of one deterministic pass


class ClassMembers:
    """Sums over members (passes, an ensemble's models, samples) that predict class probabilities of the same examples:
    softmax first, mean after.
    """

    def __init__(self) -> None:
        self.count = 0
        self._probabilities: Tensor | None = None
        self._logarithms: Tensor | None = None
        self._entropies: list[Tensor] = []
        self._first: Tensor | None = None
        self._apart: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """The members' mean prediction, (n, classes)."""
        assert self._probabilities is not None
        return self._probabilities / self.count

    @property
    def of_mean_logits(self) -> Tensor | None:
        """What the mean of the members' logits predicts, (n, classes); of one member nothing new."""
        return None if self._logarithms is None else (self._logarithms / self.count).softmax(-1)

    def add(self, probabilities: Tensor) -> None:
        """One more member, (n, classes)."""
        self._entropies.append(entropy(probabilities))
        self.count += 1
        if self._probabilities is None or self._first is None:
            self._probabilities = self._first = probabilities
            return
        apart = (probabilities - self._first).abs().amax() > _SAME
        logarithms = _log(self._first) if self._logarithms is None else self._logarithms
        self._apart = apart if self._apart is None else self._apart | apart
        self._probabilities, self._logarithms = self._probabilities + probabilities, logarithms + _log(probabilities)

    def decomposition(self) -> Decomposition:
        """As `statistics.uncertainty.classification` of all members together."""
        information = torch.stack(self._entropies).sum(0)
        if self.count == 1:
            return Decomposition(information, None, None)
        total, aleatoric = entropy(self.mean), information / self.count
        return Decomposition(total, aleatoric, (total - aleatoric).clamp(min=0))

    def each(self) -> Decomposition:
        """Of members that turn out to be separate predictions."""
        return Decomposition(torch.cat(self._entropies), None, None)

    def differ(self) -> Tensor | None:
        """A flag: whether not all say the same."""
        return self._apart


class ValueMembers:
    """Means, and perhaps variances, of the same numbers by several members: the law of total variance."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self._squares: Tensor | None = None  # of deviations from the running mean (Welford)
        self._variances: list[Tensor] = []

    def add(self, mean: Tensor, variance: Tensor | None = None) -> None:
        """One more member, of any shape."""
        mean = mean.detach().flatten().to(row_dtype(mean.device), copy=True)
        self.count += 1
        if self.mean is None or self._squares is None:
            self.mean, self._squares = mean, torch.zeros_like(mean)
        else:
            away = mean - self.mean
            self.mean = self.mean + away / self.count
            self._squares = self._squares + away * (mean - self.mean)
        if variance is not None:
            self._variances.append(variance.detach().flatten().to(mean.dtype, copy=True))

    def decomposition(self) -> Decomposition:
        """As `statistics.uncertainty.regression` of all members together."""
        assert self._squares is not None
        epistemic = self._squares / self.count if self.count > 1 else None
        if not self._variances:
            return Decomposition(None, None, epistemic)
        aleatoric = torch.stack(self._variances).sum(0) / self.count
        return Decomposition(aleatoric if epistemic is None else aleatoric + epistemic, aleatoric, epistemic)

    def each(self) -> Decomposition:
        """Of members that turn out to be separate predictions."""
        alone = torch.cat(self._variances) if self._variances else None
        return Decomposition(alone, alone, None)

    def differ(self) -> Tensor | None:
        """The same as of classes."""
        return None if self.count < 2 or self._squares is None else (self._squares > 0).any()


class Seen(NamedTuple):
    """What a gradient told of rows: which have one, of which it may have been lost, their targets, (n,), and what was
    predicted of them, (n, classes).
    """

    alive: Tensor
    faint: Tensor
    targets: Tensor
    predicted: Tensor


Refuse: TypeAlias = Callable[[Tensor], None]


class Pool:
    """Predictions of one place in the model for one input, by every way to read them."""

    def __init__(self, where: str, key: InputKey | None, generators: Generators, first: Pool | None = None) -> None:
        """first: that of the first output of the same passes, where this one is of another."""
        self.where = where
        self._key = key
        self._generators = generators
        # Further passes: flags of values that are what they were.
        self._further: list[list[Tensor]] = [] if first is None else first._further
        self._beside: dict[str, Pool] = {}
        self._index: dict[Form, Tensor | None] = {}
        self._classes: dict[tuple[str, Form], ClassMembers] = {}
        self._numbers: dict[str, ValueMembers] = {}
        self.by_place = False
        self._first: dict[Form, Seen] = {}
        self._outputs: dict[tuple[str, Form], tuple[Seen, Refuse]] = {} if first is None else first._outputs
        self._apart: list[Tensor] = []

    @property
    def passes(self) -> int:
        """How many there were."""
        return 1 + len(self._further)

    def takes(self, key: InputKey) -> bool:
        """Whether a pass with this input belongs here, and if so, that it has come."""
        if self._key is None or not self._key.same_as(key):
            return False
        self._further.append(list(key.unchanged_since(self._key)))
        return True

    def why_apart(self, key: InputKey) -> str:
        """Why a pass with this pool's input does not belong here; empty for one with another."""
        return "" if self._key is None or not self._key.has_input_of(key) else self._key.why_apart(key)

    def beside(self, name: str) -> Pool:
        """That of another output of the same passes."""
        if name not in self._beside:
            self._beside[name] = Pool(f"{self.where}.{name}", None, self._generators, self)
        return self._beside[name]

    def has_places(self, whether: bool) -> None:
        """Whether its rows are those of the input's places."""
        self.by_place = whether

    def index(self, tensor: Tensor, form: Form) -> Tensor | None:
        """Which rows of an output are read, None for all: the same in every pass."""
        if form not in self._index:
            self._index[form] = pick(tensor, form, self._generators)
        return self._index[form]

    def rows(self, tensor: Tensor, form: Form) -> Tensor:
        """The rows of an output that are read."""
        return rows_of(tensor, form, self.index(tensor, form))

    def sampled(self, form: Form) -> bool:
        """Whether the rows are a sample."""
        return self._index.get(form) is not None

    def add_classes(self, name: str, form: Form, members: Sequence[Tensor]) -> Predicted:
        """Rows of scores, (n, classes) for each member. Returns what they predict."""
        sums = self._classes.setdefault((name, form), ClassMembers())
        predicted = Predicted.of(members, form)
        for probabilities in predicted.probabilities:
            sums.add(probabilities)
        return predicted

    def add_numbers(self, name: str, means: Sequence[Tensor], variances: Sequence[Tensor] | None = None) -> None:
        """Predicted numbers, and their variances; too many of them are left out."""
        if sum(mean.numel() for mean in means) > _MOST_NUMBERS:
            return
        sums = self._numbers.setdefault(name, ValueMembers())
        for i, mean in enumerate(means):
            sums.add(mean, None if variances is None else variances[i])

    def members(self, form: Form) -> ClassMembers | None:
        """All passes so far, read in one way."""
        return next((sums for (_, other), sums in self._classes.items() if other == form), None)

    def first(self, form: Form, seen: Seen) -> Seen | None:
        """What was seen of the pass whose gradient came first, where that is another one."""
        return None if self._first.setdefault(form, seen) is seen else self._first[form]

    def of_others(self, form: Form, seen: Seen, refuse: Refuse) -> list[tuple[Seen, Refuse]]:
        """What was seen of other outputs of the one pass. refuse: takes a flag that says that it does not count."""
        others = [both for (where, its), both in self._outputs.items() if its == form and where != self.where]
        self._outputs[self.where, form] = seen, refuse
        return others if self.passes == 1 else []

    def part(self, flag: Tensor) -> None:
        """Passes are no members of one prediction where a flag says so."""
        self._apart.append(~flag)

    def mean_number(self) -> Tensor | None:
        """(n,): of a prediction of numbers, over all passes so far."""
        return next((sums.mean for sums in self._numbers.values()), None)

    def settle(self) -> Iterator[tuple[str, Tensor, bool]]:
        """No further pass will come: names, rows, and whether these are of a sample. What was added up is let go."""
        for (name, form), classes in self._classes.items():
            yield f"{name}||{self.where}", self._row(classes), self.sampled(form)
        for name, numbers in self._numbers.items():
            if any(part is not None for part in numbers.decomposition()):
                yield f"{name}||{self.where}", self._row(numbers), False
        self._classes, self._numbers, self._first = {}, {}, {}
        self._outputs.clear()

    def _row(self, sums: ClassMembers | ValueMembers) -> Tensor:
        """Of one prediction by all members; of separate ones where the flags say so."""
        together = uncertainty.compute(sums.decomposition())
        flags, apart = [flag for flags in (*self._further, self._apart) for flag in flags], sums.differ()
        if apart is not None and self.passes > 1:
            flags.append(apart)
        if not flags or sums.count < 2:
            return together
        each = sums.each()
        alone = torch.zeros_like(together) if each.total is None else uncertainty.compute(each)
        together_only = torch.stack([flag.to(together.device, non_blocking=True) for flag in flags]).all()
        return torch.where(together_only, together, alone)


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()
