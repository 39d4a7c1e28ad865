"""Passes over the same input, put together."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from torchprobe.capture.predictions.forms import Form, Generators, pick, row_count, rows_of
from torchprobe.capture.predictions.identity import InputKey
from torchprobe.capture.predictions.members import ClassMembers, ValueMembers
from torchprobe.capture.predictions.predicted import Predicted
from torchprobe.capture.predictions.tally import Tally
from torchprobe.statistics import uncertainty

NUMBERS = "numbers"
"""The form of a plain output that holds numbers: told by a loss module, or by `task=`."""

_MOST_NUMBERS = 2**20


class Pool:
    """Predictions of one place in the model for one input, by every way to read them."""

    def __init__(self, where: str, key: InputKey | None, generators: Generators) -> None:
        self.where = where
        self.key = key
        self._generators = generators
        self._index: dict[Form, Tensor | None] = {}
        self._classes: dict[tuple[str, Form], ClassMembers] = {}
        self._sampled: set[Form] = set()
        self._numbers: dict[str, ValueMembers] = {}

    def rows(self, tensor: Tensor, form: Form) -> Tensor:
        """The rows of an output that are read: the same in every pass."""
        if form not in self._index:
            self._index[form] = pick(tensor, form, self._generators)
            if self._index[form] is not None:
                self._sampled.add(form)
        return rows_of(tensor, form, self._index[form])

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
        found = next((sums for (_, other), sums in self._classes.items() if other == form), None)
        return None if found is None else found.mean

    def sampled(self, form: Form) -> bool:
        """Whether the rows are a sample."""
        return form in self._sampled

    def settle(self, tally: Tally) -> None:
        """No further pass will come."""
        for (name, form), classes in self._classes.items():
            row = uncertainty.compute(classes.decomposition())
            tally.add(f"{name}||{self.where}", row, sampled=form in self._sampled)
        for name, numbers in self._numbers.items():
            found = numbers.decomposition()
            if any(part is not None for part in found):
                tally.add(f"{name}||{self.where}", uncertainty.compute(found))


def same_rows(tensor: Tensor, form: Form, other: Tensor, other_form: Form) -> bool:
    """Whether two tensors hold as many rows of as many classes."""
    classes = [1 if f.kind == "sigmoid" else x.shape[f.axis] for x, f in ((tensor, form), (other, other_form))]
    return classes[0] == classes[1] and row_count(tensor, form) == row_count(other, other_form)
