"""What makes the Custom Scalars page useful: bands over the layers, and the layout of the charts that a run has."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from statistics import median
from typing import NamedTuple, TypeAlias

from torchprobe.records import Layout, Lines, Margin, Record, Value, of_tags
from torchprobe.writers.hparams import FINAL
from torchprobe.writers.protocol import Writer, restart

LAYOUT_TAG = "custom_scalars__config__"
GROUP = "layers"
DESCRIPTION = "A statistic over all layers of the model: the smallest, the median and the largest finite value."
BANDED = frozenset(
    {
        *("activation_grad_norm", "activation_rms", "activation_zero_fraction"),
        *("attention_entropy", "attention_max_logit", "attention_sink"),
        *("grad_mean_abs", "grad_norm_layer", "update_ratio"),
    }
)
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


class _Shown(NamedTuple):
    """What a run has so far, for its Custom Scalars page."""

    seen: frozenset[str] = frozenset()  # tags of all records
    charted: frozenset[str] = frozenset()  # those of them that belong to a chart
    wanted: Layout = Layout({})
    written: Layout = Layout({})
    step: int = -1
    added: frozenset[str] = frozenset()  # tags of ours in this step, which may come in several records


class LayoutWriter:
    """Wraps a writer of event files.

    The page shows a run's latest layout, so one goes out with the first step and again with each step that brings
    a new kind of chart, such as the first validation. What is added to a record depends on the records before it
    alone: a batch that is written again has the same bytes.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._shown = _Shown()
        self._banded = of_tags(banded_in)

    def write(self, records: Sequence[Record]) -> None:
        """Pass a batch on, with bands and layouts. What the wrapped writer raises, with nothing changed."""
        before = self._shown
        try:
            self._writer.write([self._completed(record) for record in records])
        except BaseException:
            self._shown = before
            raise

    def restart(self, step: int) -> None:
        """The wrapped writer's."""
        restart(self._writer, step)

    def close(self) -> None:
        """Close the wrapped writer."""
        self._writer.close()

    def _completed(self, record: Record) -> Record:
        shown = self._shown
        added = shown.added if record.step == shown.step else frozenset()
        found = bands(record, self._banded(tuple(record.values)))
        extra: dict[str, Value] = {tag: value for tag, value in found if tag not in added}
        shown = _with_tags(_with_tags(shown, record.values), extra)
        if shown.wanted != shown.written and LAYOUT_TAG not in added:
            extra[LAYOUT_TAG] = shown.wanted
            shown = shown._replace(written=shown.wanted)
        self._shown = shown._replace(step=record.step, added=added.union(extra))
        if not extra:
            return record
        descriptions = {**record.descriptions, GROUP: DESCRIPTION}
        return dataclasses.replace(record, values={**record.values, **extra}, descriptions=descriptions)


def _with_tags(shown: _Shown, values: Mapping[str, Value]) -> _Shown:
    """With the tags of a step, and the layout for them if there are new ones."""
    new = values.keys() - shown.seen
    charted = {tag for tag in new if isinstance(values[tag], Real) and CHARTED.match(tag)}
    if charted:
        every = shown.charted.union(charted)
        shown = shown._replace(charted=every, wanted=layout_of(every))
    return shown._replace(seen=shown.seen.union(new)) if new else shown


def band_tags(prefix: str, group: str) -> tuple[str, str, str]:
    """Tags of the median, the smallest and the largest; prefix is empty or `val/`."""
    start = f"{prefix}{GROUP}/{group}"
    return f"{start}/median", f"{start}/min", f"{start}/max"


Banded: TypeAlias = Mapping[tuple[str, str, str], Sequence[str]]
"""Tags of what goes into each band, by the tags of the band."""


def bands(record: Record, banded: Banded) -> Iterator[tuple[str, float]]:
    """Tags and values of the bands of a record; a group with fewer than two finite values has none."""
    for band, tags in banded.items():
        numbers = [record.values[tag] for tag in tags]
        values = [float(x) for x in numbers if (type(x) is float or isinstance(x, Real)) and math.isfinite(x)]
        if len(values) > 1:
            yield from zip(band, (median(values), min(values), max(values)), strict=True)


def banded_in(tags: Iterable[str]) -> Banded:
    """What there is to make bands of."""
    found: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    for tag in tags:
        rest = tag.removeprefix("val/")
        group = rest.partition("/")[0]
        if group in BANDED:
            found[band_tags("val/" if rest is not tag else "", group)].append(tag)
    return found


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
    return _between(f"{title} (median layer, smallest to largest)", *band_tags("", group))


def _between(title: str, line: str, lower: str, upper: str) -> _Maker:
    """A chart of tags, each between two others, in training and in validation; `*` is the same in all three."""
    pattern = re.compile("(?P<val>val/)?" + line.replace("*", "(?P<rest>.+)"))

    def make(tags: Collection[str]) -> Margin | None:
        found = [match.groupdict("") for tag in sorted(tags) if (match := pattern.fullmatch(tag))]
        series = [[m["val"] + tag.replace("*", m.get("rest", "")) for tag in (line, lower, upper)] for m in found]
        there = [(a, b, c) for a, b, c in series if b in tags and c in tags]
        return Margin(title, tuple(there[:_MAX_SERIES])) if there else None

    return make


_CATEGORIES: dict[str, tuple[_Maker, ...]] = {
    "Overview": (
        _lines("Loss", "(.+/)?loss"),
        _lines("Accuracy", "(.+/)?(accuracy|acc)"),
        _lines("Gradient norm (before clipping and as used)", "overview/grad_norm(_unclipped)?"),
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
            "attention_entropy/*",
            "attention_entropy_min/*",
            "attention_entropy/*",
        ),
        _band("Largest logit", "attention_max_logit"),
        _band("Probability on the first key", "attention_sink"),
        _lines("Largest logit of every layer", "attention_max_logit/.+"),
    ),
    "Uncertainty": (
        _between(
            "Total; the band below it is the epistemic part",
            "uncertainty_total/*",
            "uncertainty_aleatoric/*",
            "uncertainty_total/*",
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
