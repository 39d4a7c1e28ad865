"""Running sums over members (passes, an ensemble's models, samples), so that no member has to be kept."""

from __future__ import annotations

import torch
from torch import Tensor

from torchprobe.statistics.dtypes import row_dtype
from torchprobe.statistics.uncertainty import Decomposition, entropy


class ClassMembers:
    """Class probabilities of the same examples by several members: softmax first, mean after."""

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
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None  # of deviations from the running mean (Welford)
        self._variance: Tensor | None = None

    def add(self, mean: Tensor, variance: Tensor | None = None) -> None:
        """One more member, of any shape."""
        mean = mean.detach().flatten().to(row_dtype(mean.device))
        self.count += 1
        if self._mean is None or self._squares is None:
            self._mean, self._squares = mean, torch.zeros_like(mean)
        else:
            away = mean - self._mean
            self._mean = self._mean + away / self.count
            self._squares = self._squares + away * (mean - self._mean)
        if variance is not None:
            variance = variance.detach().flatten().to(mean.dtype)
            self._variance = variance if self._variance is None else self._variance + variance

    def decomposition(self) -> Decomposition:
        """As `statistics.uncertainty.regression` of all members together."""
        assert self._squares is not None
        epistemic = self._squares / self.count if self.count > 1 else None
        if self._variance is None:
            return Decomposition(None, None, epistemic)
        aleatoric = self._variance / self.count
        return Decomposition(aleatoric if epistemic is None else aleatoric + epistemic, aleatoric, epistemic)
