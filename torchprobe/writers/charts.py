"""Which charts the Custom Scalars page of a run shows, given the tags that the run has."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeAlias

from torchprobe.records import Layout, Lines, Margin
from torchprobe.writers.bands import band_tags
from torchprobe.writers.hparams import FINAL

_MAX_SERIES = 40  # of one chart: more colours nobody tells apart

_NOT_FINAL = f"(?!{FINAL}/)"  # the last value alone makes no line

CHARTED = re.compile(
    _NOT_FINAL + r"(val/)?("
    r"(.+/)?(loss|acc|accuracy)$|(overview|lr|layers|calibration)/|epistemic$"
    r"|(grad_norm_layer|activation_rms|attention_entropy|attention_entropy_min|attention_max_logit)/"
    r"|uncertainty_(total|aleatoric|epistemic)/)"
)
"""Tags that a chart can show."""

_Chart: TypeAlias = "Lines | Margin"
_Maker: TypeAlias = Callable[[Collection[str]], "_Chart | None"]


def layout_of(tags: Collection[str]) -> Layout:
    """The layout for these scalar tags; it has no chart without a line, and no category without a chart."""
    made = {title: tuple(chart for make in makers if (chart := make(tags))) for title, makers in _CATEGORIES.items()}
    return Layout({title: charts for title, charts in made.items() if charts})


def _lines(title: str, *patterns: str) -> _Maker:
    """A chart of the tags that fit the patterns as a whole, in training and in validation."""
    whole = [f"{_NOT_FINAL if pattern.startswith('(.+/)') else ''}(val/)?{pattern}$" for pattern in patterns]

    def make(tags: Collection[str]) -> Lines | None:
        fitting = tuple(pattern for pattern in whole if any(map(re.compile(pattern).match, tags)))
        return Lines(title, fitting) if fitting else None

    return make


def _band(title: str, group: str) -> _Maker:
    """A chart of the median over all layers, between the smallest and the largest."""

    def make(tags: Collection[str]) -> Margin | None:
        return _margin(
            f"{title} (median layer, smallest to largest)", [band_tags(prefix, group) for prefix in ("", "val/")], tags
        )

    return make


def _between(title: str, line: str, lower: str, upper: str) -> _Maker:
    """A chart of one group's tags, each between the tags of two other groups that have the same ending."""

    def make(tags: Collection[str]) -> Margin | None:
        return _margin(title, list(_triples(sorted(tags), line, lower, upper)), tags)

    return make


def _triples(tags: Sequence[str], *groups: str) -> Iterator[tuple[str, str, str]]:
    start = re.compile(f"(val/)?{groups[0]}/")
    for tag in tags:
        found = start.match(tag)
        if found:
            line, lower, upper = (f"{found[1] or ''}{group}/{tag[found.end() :]}" for group in groups)
            yield line, lower, upper


def _margin(title: str, series: Sequence[tuple[str, str, str]], tags: Collection[str]) -> Margin | None:
    there = [triple for triple in series if all(tag in tags for tag in triple)]
    return Margin(title, tuple(there[:_MAX_SERIES])) if there else None


_CATEGORIES: dict[str, tuple[_Maker, ...]] = {
    "Overview": (
        _lines("Loss", "(.+/)?loss"),
        _lines("Accuracy", "(.+/)?(accuracy|acc)"),
        _lines("Gradient norm", "overview/grad_norm"),
        _lines("Update ratio (healthy: about 0.001)", "overview/update_ratio"),
        _lines("Attention entropy of the lowest head", "overview/attention_entropy_min"),
        _lines("Largest attention logit", "overview/attention_max_logit"),
        _lines("Uncertainty", "overview/(epistemic|aleatoric)"),
        _lines("Calibration error (ECE)", "overview/ece"),
        _lines("Alerts", "overview/alerts"),
        _lines("Learning rate", "lr/.+"),
        _lines("Skipped steps, dropped records", "overview/(skipped_steps|dropped_records)"),
        _lines("Time spent by torchprobe (fraction)", "overview/probe_overhead"),
    ),
    "Gradients": (
        _band("Gradient norm", "grad_norm_layer"),
        _band("Mean absolute gradient", "grad_mean_abs"),
        _band("Update ratio", "update_ratio"),
        _band("Gradient of activations", "activation_grad_norm"),
        _lines("Gradient norm of every layer", "grad_norm_layer/.+"),
    ),
    "Activations": (
        _band("Root mean square", "activation_rms"),
        _band("Fraction of zeros", "activation_zero_fraction"),
        _lines("Root mean square of every layer", "activation_rms/.+"),
    ),
    "Attention": (
        _band("Entropy", "attention_entropy"),
        _between(
            "Entropy of every layer (mean over heads, from the lowest head)",
            "attention_entropy",
            "attention_entropy_min",
            "attention_entropy",
        ),
        _band("Largest logit", "attention_max_logit"),
        _band("Probability on the first key", "attention_sink"),
        _lines("Largest logit of every layer", "attention_max_logit/.+"),
    ),
    "Uncertainty": (
        _between(
            "Total; the band below it is the epistemic part",
            "uncertainty_total",
            "uncertainty_aleatoric",
            "uncertainty_total",
        ),
        _lines("Epistemic", "uncertainty_epistemic/.+", "epistemic"),
        _lines("Total", "uncertainty_total/.+"),
    ),
    "Calibration": (
        _lines("Confidence and accuracy", "calibration/(.+/)?(confidence|accuracy)"),
        _lines("Calibration error", "calibration/(.+/)?(ece|mce)"),
        _lines("Confidence gap (above 0: over-confident)", "calibration/(.+/)?confidence_gap"),
        _lines("Brier score, negative log-likelihood", "calibration/(.+/)?(brier|nll)"),
    ),
}
