"""Uncertainty: what a model's outputs say about how sure it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from torchprobe.arguments import checked_patterns
from torchprobe.probes.base import InValidation, Probe, Reporter
from torchprobe.probes.evidence import EVIDENCE, SURE, Evidence, added_up, by_loop, form_of
from torchprobe.probes.schedule import Schedule
from torchprobe.records import Histogram, Value
from torchprobe.statistics import uncertainty

Task = Literal["classification", "regression"]

_WHAT = {
    "total": "all of it: entropy of the mean prediction in nats, or the prediction's variance",
    "aleatoric": "what is in the data: mean entropy of the members' predictions, or the mean predicted variance",
    "epistemic": "what the model does not know: the difference (mutual information), or the variance of the means",
}
_GROUPS = {
    "entropy": "Differential entropy of the predicted distribution in nats, mean over the batch",
    "vacuity": "Classes / sum of alpha of a Dirichlet output: 1 without evidence, mean over the batch",
    "kl": "The divergence from the prior that the model returns beside its output, mean over passes",
}


def _descriptions(how: str, note: str) -> dict[str, str]:
    texts, note = {}, f" {note}" if note else ""
    for kind, what in _WHAT.items():
        texts[f"uncertainty_{kind}"] = f"Uncertainty, {what}; mean over the batch ({how}).{note}"
        texts[f"uncertainty_{kind}_histogram"] = f"log10 of every example's uncertainty, {kind} ({how}).{note}"
    for group, what in _GROUPS.items():
        texts[f"uncertainty_{group}"] = f"{what} ({how}).{note}"
        texts[f"uncertainty_{group}_histogram"] = f"log10 of every example's value ({how}).{note}"
    return texts


class Uncertainty(Probe):
    """Uncertainty of the model's outputs, found by itself: `uncertainty_total/<where>`, `_aleatoric/`, `_epistemic/`.

    Read are, in training and validation: fields called epistemic, aleatoric, uncertainty, variance, entropy;
    `torch.distributions` and gpytorch objects; `(output, kl)` of Bayesian layers. Once a loss has confirmed it: plain
    outputs and fields called logits or probs, as classes or answers; log_var, std, sigma, or the second of a pair, by a
    Gaussian likelihood; alpha, evidence by an evidential one. Passes over one and the same input tensor, unchanged,
    with unchanged weights, that draw random numbers of torch's and whose outputs differ, are members of one prediction
    where the model keeps nothing else between them (a batch norm's statistics aside) and the loss asks the same of all;
    and so are an `nn.ModuleList`'s modules whose mean the model gives. Of several outputs the first is `root`, another
    `root.<output>`; of several loops of validation, `root.loop_1` beside the whole.

    every: the cadence. sample_dim: the dimension of an output along which samples lie (`torch.func`, stacked
    members). modules: name patterns of modules to read beside the model itself. task: what a plain output is, where
    no loss tells.

    Means over the examples of a batch; histograms of their logarithms. Of an output of more than 4 million numbers
    a sample of rows is read, and the tags' descriptions say so. Raises TypeError or ValueError for other arguments.
    """

    source: ClassVar[str] = "uncertainty"
    found_everywhere: ClassVar[bool] = False
    fields: ClassVar[tuple[str, ...]] = (*uncertainty.FIELDS, *EVIDENCE)
    reduce = "sum"
    in_validation: InValidation = "all"
    descriptions: Mapping[str, str] = _descriptions("exact", "")

    def __init__(
        self,
        every: int | Schedule | None = None,
        *,
        sample_dim: int | None = None,
        modules: str | Iterable[str] = (),
        task: Task | None = None,
    ) -> None:
        super().__init__(every)
        if sample_dim is not None and (isinstance(sample_dim, bool) or not isinstance(sample_dim, int)):
            raise TypeError(f"sample_dim={sample_dim!r}: takes a dimension of the output, such as 0, or None")
        if task is not None and task not in get_args(Task):
            raise ValueError(f"task={task!r}: takes 'classification', 'regression' or None")
        self.sample_dim = sample_dim
        self.modules = checked_patterns("modules", modules, "heads.*")
        self.task: Task | None = task

    def reporter(self) -> UncertaintyReporter:
        """Learns what the model's output is."""
        return UncertaintyReporter(self)


class UncertaintyReporter(Reporter):
    """Uncertainty in one session: what has been learnt of the output."""

    rows_suffice: ClassVar[bool] = False

    def __init__(self, probe: Uncertainty) -> None:
        super().__init__(probe)
        self.evidence = Evidence()
        self._note = ""

    def describe(self, note: str) -> None:
        """What else is known of the output, for the tags' descriptions."""
        self._note = note

    def learn(self, names: Sequence[str], rows: NDArray[np.float64]) -> None:
        """Whether the model's plain output holds classes."""
        self.evidence.weigh({name: row[-len(EVIDENCE) :] for name, row in added_up(names, rows).items()})

    def report_all(self, names: Sequence[str], rows: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
        """A name is `<form>|<group>|<where>`."""
        self.learn(names, rows)
        loops = by_loop(names, rows)
        found = loops.pop("")
        how = "a sample of rows" if any(row[-1] for row in found.values()) else "exact"
        self.descriptions = _descriptions(how, self._note)
        means: dict[str, dict[str, float]] = {}
        for (group, where), row in self._confirmed(found).items():
            yield from _tags(group, where, row)
            if not group:
                means[where] = uncertainty.summarise(row)
        yield from _overview(means)
        for loop, of_loop in loops.items():
            for (group, where), row in self._confirmed(of_loop).items():
                yield from _tags(group, f"{where}.{loop}", row)
        if not means and not self.reason and any(row[-len(EVIDENCE)] > 0 for row in found.values()):
            self.explain(
                "the loss told no form of the model's output, or all predictions of an example have one target, as "
                "those of members have: Uncertainty(task='classification') or task='regression' says what it is, "
                "sample_dim= along which dimension members lie"
            )

    def _confirmed(self, found: Mapping[str, NDArray[np.float64]]) -> dict[tuple[str, str], NDArray[np.float64]]:
        """One row a group and place: what the output says itself before what a loss told of it."""
        confirmed: dict[tuple[str, str], NDArray[np.float64]] = {}
        for name, row in sorted(found.items(), key=lambda item: form_of(item[0]) != SURE):
            _, group, where = name.split("|", 2)
            if self.evidence.holds(name) and row[: -len(EVIDENCE)].any():
                confirmed.setdefault((group, where), row[: -len(EVIDENCE)])
        return confirmed


def _tags(group: str, where: str, row: NDArray[np.float64]) -> Iterator[tuple[str, Value]]:
    for kind, value in uncertainty.summarise(row).items():
        name = kind.replace("total", group) if group else kind
        if value or not kind.endswith("_nonfinite"):
            yield f"uncertainty_{name}/{where}", value
    if group != "kl":
        for kind, (edges, counts) in uncertainty.histograms(row).items():
            yield f"uncertainty_{group or kind}_histogram/{where}", Histogram(edges, counts)


def _overview(means: Mapping[str, Mapping[str, float]]) -> Iterator[tuple[str, Value]]:
    """The model's own output, else the mean over what its parts say."""
    for kind in ("epistemic", "aleatoric"):
        values = {where: found[kind] for where, found in means.items() if kind in found}
        if values:
            yield f"overview/{kind}", values.get("root", float(np.mean(list(values.values()))))
