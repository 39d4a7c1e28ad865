"""Passes over the same input, put together: whether they are such, and running sums over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from torchprobe.capture.outputs import tensors_in
from torchprobe.capture.predictions.forms import Form, Generators, Predicted, pick, rows_of
from torchprobe.statistics import uncertainty
from torchprobe.statistics.dtypes import row_dtype
from torchprobe.statistics.uncertainty import Decomposition, entropy

NUMBERS = "numbers"
"""The form of a plain output that holds numbers: told by a loss module, or by `task=`."""

_MOST_NUMBERS = 2**20


class InputKey:
    """What a pass was called with: the same tensors, unchanged, and the same weights; keeps nothing alive."""

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any], weights_version: int) -> None:
        self._tensors = [(ref(tensor), version_of(tensor)) for tensor in input_tensors(args, kwargs)]
        self._others = [_remembered(part) for part in (*args, *kwargs.items()) if not _has_tensor(part)]
        self._weights = weights_version

    def same_as(self, other: InputKey) -> bool:
        """Whether both are certainly the same input; never so without a tensor in it."""
        if not self._tensors or len(self._tensors) != len(other._tensors) or self._weights != other._weights:
            return False
        pairs = zip(self._tensors, other._tensors, strict=True)
        return all(a() is not None and a() is b() and n == m for (a, n), (b, m) in pairs) and _equal(
            self._others, other._others
        )


def input_tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Every tensor that a module was called with."""
    return [*tensors_in(tuple(args)), *tensors_in(dict(kwargs))]


class ClassMembers:
    """Sums over members (passes, an ensemble's models, samples) that predict class probabilities of the same examples:
    softmax first, mean after.
    """

    def __init__(self) -> None:
        self.count = 0
        self._probabilities: Tensor | None = None
        self._entropy: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """The members' mean prediction, (n, classes)."""
        assert self._probabilities is not None
        return self._probabilities / self.count

    def add(self, probabilities: Tensor) -> None:
        """One more member, (n, classes)."""
        information = entropy(probabilities)
        self._probabilities = probabilities if self._probabilities is None else self._probabilities + probabilities
        self._entropy = information if self._entropy is None else self._entropy + information
        self.count += 1

    def decomposition(self) -> Decomposition:
        """As `statistics.uncertainty.classification` of all members together."""
        assert self._entropy is not None
        if self.count == 1:
            return Decomposition(self._entropy, None, None)
        total = entropy(self.mean)
        aleatoric = self._entropy / self.count
        return Decomposition(total, aleatoric, (total - aleatoric).clamp(min=0))


class ValueMembers:
    """Means, and perhaps variances, of the same numbers by several members: the law of total variance."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self._squares: Tensor | None = None  # of deviations from the running mean (Welford)
        self._variance: Tensor | None = None

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
            variance = variance.detach().flatten().to(mean.dtype, copy=True)
            self._variance = variance if self._variance is None else self._variance + variance

    def decomposition(self) -> Decomposition:
        """As `statistics.uncertainty.regression` of all members together."""
        assert self._squares is not None
        epistemic = self._squares / self.count if self.count > 1 else None
        if self._variance is None:
            return Decomposition(None, None, epistemic)
        aleatoric = self._variance / self.count
        return Decomposition(aleatoric if epistemic is None else aleatoric + epistemic, aleatoric, epistemic)


class Pool:
    """Predictions of one place in the model for one input, by every way to read them."""

    def __init__(self, where: str, key: InputKey | None, generators: Generators) -> None:
        self.where = where
        self._key = key
        self._generators = generators
        self._index: dict[Form, Tensor | None] = {}
        self._classes: dict[tuple[str, Form], ClassMembers] = {}
        self._numbers: dict[str, ValueMembers] = {}

    def takes(self, key: InputKey) -> bool:
        """Whether a pass with this input belongs here."""
        return self._key is not None and self._key.same_as(key)

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

    def mean_prediction(self, form: Form) -> Tensor | None:
        """(n, classes): over all passes so far."""
        return next((sums.mean for (_, other), sums in self._classes.items() if other == form), None)

    def mean_number(self) -> Tensor | None:
        """(n,): of a prediction of numbers, over all passes so far."""
        return next((sums.mean for sums in self._numbers.values()), None)

    def settle(self) -> Iterator[tuple[str, Tensor, bool]]:
        """No further pass will come: names, rows, and whether these are of a sample. What was added up is let go."""
        for (name, form), classes in self._classes.items():
            yield f"{name}||{self.where}", uncertainty.compute(classes.decomposition()), self.sampled(form)
        for name, numbers in self._numbers.items():
            found = numbers.decomposition()
            if any(part is not None for part in found):
                yield f"{name}||{self.where}", uncertainty.compute(found), False
        self._classes, self._numbers = {}, {}


def _remembered(part: Any) -> object:
    """A simple value itself; of anything else a weak reference, or what is never equal where it takes none."""
    if _is_simple(part):
        return part
    try:
        return ref(part)
    except TypeError:
        return object()


def _equal(a: Sequence[object], b: Sequence[object]) -> bool:
    """Of simple values; anything else has to be the same living object."""
    return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))


def _same(x: object, y: object) -> bool:
    if isinstance(x, ReferenceType) and isinstance(y, ReferenceType):
        return x() is not None and x() is y()
    return _is_simple(x) and _is_simple(y) and x == y


def _has_tensor(part: Any) -> bool:
    return next(tensors_in(part), None) is not None


def _is_simple(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_simple, value))
    return value is None or isinstance(value, str | int | float | bool)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place, where that is counted."""
    return 0 if tensor.is_inference() else tensor._version
