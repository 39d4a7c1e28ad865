"""What explicit calls hand in: checked at the call, and put on a page as tensors and rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torchprobe.buffer.step import Piece
from torchprobe.logbook import Page
from torchprobe.naming import named_parameters
from torchprobe.probes.attention import AttentionWeights
from torchprobe.probes.base import Reporter
from torchprobe.probes.calibration import FLAGS, GIVEN, Calibration
from torchprobe.probes.evidence import EVIDENCE, SURE
from torchprobe.probes.gradients import Gradients
from torchprobe.probes.histograms import GradientHistograms, ParameterHistograms
from torchprobe.probes.learning_rates import LearningRates, LearningRatesReporter
from torchprobe.probes.uncertainty import Uncertainty
from torchprobe.records import Text
from torchprobe.statistics import calibration, uncertainty
from torchprobe.statistics.uncertainty import Decomposition
from torchprobe.user_values import floats
from torchprobe.writers.hparams import checked_hparams

_T = TypeVar("_T")
_Tensors = Sequence[tuple[str, Tensor]]


class Probes:
    """The probes of `instrument`, fed by hand."""

    def __init__(self) -> None:
        self.rates = LearningRatesReporter(LearningRates())
        self._gradients = Gradients().reporter()
        self._histograms = GradientHistograms().reporter(), ParameterHistograms().reporter()
        self._attention = AttentionWeights().reporter()
        self._uncertainty = Uncertainty().reporter()
        self._calibration = Calibration().reporter()

    def of_gradients(self, model: nn.Module) -> Iterator[Piece]:
        """Norms of the gradients that there are."""
        yield from _rows(self._gradients, _gradients(model))

    def of_distributions(self, model: nn.Module) -> Iterator[Piece]:
        """Histograms of the gradients that there are, and of all parameters."""
        of_gradients, of_parameters = self._histograms
        yield from _rows(of_gradients, _gradients(model))
        yield from _rows(of_parameters, [(name, p.detach()) for name, p in named_parameters(model)])

    def add_attention(self, page: Page, layers: _Tensors, prefix: str) -> None:
        """A row a head of each layer."""
        probe = self._attention.probe
        for name, weights in layers:
            page.accumulate(self._attention, name, probe.compute(weights), prefix, probe.combine)

    def add_uncertainty(self, page: Page, parts: Decomposition, name: str, prefix: str) -> None:
        """The row of a batch; no evidence is needed for what the user says it is."""
        row = uncertainty.compute(parts)
        row = torch.cat((row, row.new_zeros(len(EVIDENCE))))
        page.accumulate(self._uncertainty, f"{SURE}||{name}", row[None], prefix)

    def add_calibration(self, page: Page, probs: Tensor, targets: Tensor, prefix: str, pictures: bool) -> None:
        """The row of a batch, as of validation: it is not added up over steps."""
        row = calibration.compute(probs, targets)
        flags = [row.new_full((1,), float(pictures or flag != "pictures")) for flag in FLAGS]
        row = torch.cat((row, row.new_zeros(len(EVIDENCE)), *flags))
        page.accumulate(self._calibration, f"{SURE}|{GIVEN}|val", row[None], prefix)


def checked(argument: str, value: object, kind: type[_T]) -> _T:
    """The value itself. Raises TypeError when it is of another kind."""
    if not isinstance(value, kind):
        raise TypeError(f"{argument}={value!r}: takes a {kind.__name__}, not {type(value).__name__}")
    return value


def uncertainty_of(epistemic: Any, aleatoric: Any) -> Decomposition:
    """As given, with their sum for the total where both are. Raises TypeError for what is no array of numbers."""
    e = floats("epistemic", epistemic)
    if aleatoric is None:
        return Decomposition(None, None, e)
    a = floats("aleatoric", aleatoric).to(e.device, non_blocking=True)
    if a.shape != e.shape:
        raise ValueError(f"aleatoric: got shape {tuple(a.shape)}, takes that of epistemic, {tuple(e.shape)}")
    return Decomposition(e + a, a, e)


def table(hparams: Mapping[str, Any]) -> Text:
    """Hyperparameters for the Text page. Raises TypeError for what the HParams page cannot show."""
    lines = [f"| {name} | `{value}` |" for name, value in checked_hparams(hparams).items()]
    return Text("\n".join(["| hyperparameter | value |", "| --- | --- |", *lines]))


def attention_layers(weights: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """One layer's probabilities, or those of several: from a mapping by its keys, from a sequence by place.

    Each as (batch, heads, queries, keys); three dimensions are those of heads that were averaged. Raises TypeError and
    ValueError for what is none.
    """
    if isinstance(weights, Mapping):
        for key, layer in weights.items():
            yield from attention_layers(layer, f"{name}.{key}" if name else str(key))
    elif isinstance(weights, list | tuple):
        for i, layer in enumerate(weights):
            yield from attention_layers(layer, f"{name}.{i}" if name else str(i))
    elif weights is not None:  # what some models return for a layer without attention
        yield name or "attention", _four_dimensional(name, floats("weights", weights))


def _gradients(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The gradients that parameters hold now; of a sparse one the stored values, duplicates summed."""
    found = ((name, p.grad.detach()) for name, p in named_parameters(model) if p.grad is not None)
    return [(name, grad.coalesce().values() if grad.is_sparse else grad) for name, grad in found]


def _rows(reporter: Reporter, tensors: _Tensors) -> Iterator[Piece]:
    """A row a tensor, in one piece a device."""
    groups: defaultdict[torch.device, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, tensor in tensors:
        groups[tensor.device].append((name, tensor))
    for group in groups.values():
        yield Piece(reporter, [name for name, _ in group], reporter.probe.compute_all([tensor for _, tensor in group]))


def _four_dimensional(name: str, weights: Tensor) -> Tensor:
    if weights.dim() not in (3, 4):
        raise ValueError(
            f"weights of {name!r}: got shape {tuple(weights.shape)}, takes probabilities of shape "
            "(batch, heads, queries, keys), or (batch, queries, keys) of averaged heads"
        )
    return weights.unsqueeze(1) if weights.dim() == 3 else weights
