"""A run as one HTML file that needs nothing else: no script, no network, plots as SVG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from torchprobe.reports.events import Series, visible
from torchprobe.reports.run import Run
from torchprobe.reports.summary import ROUNDING, endings, headline, listed, reason

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 320, 150, 52, 18
_POINTS = 400  # of a curve: more would not be seen
_GROUPS = (
    "overview", "train", "val", "calibration", "grad_norm_layer", "update_ratio", "activation_std",
    "attention_entropy", "attention_max_logit", "uncertainty_epistemic", "lr",
)  # fmt: skip
_OF_THE_RUN = 3  # so many of them; then the layers
_STYLE = """
body{font:14px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.4em}h2{font-size:1.1em;margin-top:2em;border-bottom:1px solid #ddd}
figure{display:inline-block;margin:.5em .6em .5em 0}figcaption{font-size:12px;overflow-wrap:anywhere;max-width:320px}
table{border-collapse:collapse}td,th{padding:.15em .8em .15em 0;text-align:left}td.n{text-align:right}
.alert{color:#a40000}.well{color:#1a7f37}text{font:10px system-ui,sans-serif;fill:#666}
"""


def page(run: Run, summary: Mapping[str, Any]) -> str:
    """The whole document."""
    body = "\n".join(_parts(run, summary))
    title = escape(summary["run"])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>torchprobe: {title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def _parts(run: Run, summary: Mapping[str, Any]) -> Iterator[str]:
    yield f"<p>{escape(headline(summary))}.</p>"
    yield from (f'<p class="alert">{escape(ending)}</p>' for ending in endings(summary))
    if summary["hparams"]:
        yield f"<p>{escape(listed(summary['hparams']))}</p>"
    yield from _alerts(summary["alerts"])
    for flight in summary["flight_recordings"]:
        about = f"Flight recording of step {flight.get('step', '?')}{reason(flight)}: {visible(flight['file'])}"
        yield f'<p class="alert">{escape(about)}</p>'
    for i, group in enumerate(_GROUPS):
        if i == _OF_THE_RUN:
            yield from _layers(summary["layers"])
        series = {name: curve for name, curve in run.group(group).items() if group != "val" or _is_general(name)}
        if series:
            yield f"<h2>{escape(group)}</h2>"
            yield from (_figure(name, curve) for name, curve in series.items())


def _is_general(name: str) -> bool:
    """Whether a number of validation is of the whole model."""
    return "/" not in name or name.startswith(("overview/", "calibration/"))


def _alerts(alerts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not alerts:
        yield '<p class="well">No alert.</p>'
    for alert in alerts:
        said = escape(alert["said"] or alert["rule"])
        steps = alert["steps"]
        others = f", {len(steps) - 1} more" if len(steps) > 1 else ""
        yield f'<p class="alert">{said} (first at step {steps[0]}{others})</p>'
        if alert["advice"]:
            yield f"<p>{escape(alert['advice'])}</p>"


def _layers(layers: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    rows = [(title, row) for title, found in layers.items() for row in found]
    if rows:
        yield "<h2>layers to look at</h2><table>"
        for above, (title, row) in zip([None, *(title for title, _ in rows)], rows, strict=False):
            where, what = escape(row["where"]), "" if title == above else escape(title)
            yield f'<tr><td>{what}</td><td>{where}</td><td class="n">{row["value"]:.4g}</td></tr>'
        yield "</table>"


def _figure(name: str, series: Series) -> str:
    return f"<figure>{plot(series)}<figcaption>{escape(name)}: {series.last:.4g}</figcaption></figure>"


def plot(series: Series) -> str:
    """A line over steps as SVG; points that are not finite leave a gap."""
    keep = np.unique(np.linspace(0, len(series.steps) - 1, _POINTS).round().astype(np.int64))
    steps, values = series.steps[keep].astype(np.float64), series.values[keep]
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if high - low <= ROUNDING * max(abs(high), abs(low)):
        values, low = np.where(np.isfinite(values), high, values), high
    x = _LEFT + (steps - steps[0]) / max(steps[-1] - steps[0], 1.0) * (_WIDTH - _LEFT - 4)
    y = 6 + (high - values) / ((high - low) or 1.0) * (_HEIGHT - _BOTTOM - 12)
    width = 1.5 if finite.size > 1 else 5  # one point is a dot
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img">'
        f'<path d="{_path(x, y)}" fill="none" stroke="#21918c" stroke-width="{width}" stroke-linecap="round"/>'
        f'<text x="2" y="12">{high:.3g}</text><text x="2" y="{_HEIGHT - _BOTTOM - 4}">{low:.3g}</text>'
        f'<text x="{_LEFT}" y="{_HEIGHT - 4}">step {int(steps[0])}</text>'
        f'<text x="{_WIDTH - 4}" y="{_HEIGHT - 4}" text-anchor="end">{int(steps[-1])}</text></svg>'
    )


def _path(x: Any, y: Any) -> str:
    """A point by itself is drawn as a line of no length, which round ends make a dot."""
    parts, pen_down = [], False
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        if np.isfinite(b):
            parts.append(f"{'L' if pen_down else 'M'}{a:.1f},{b:.1f}" + ("" if pen_down else f"L{a:.1f},{b:.1f}"))
        pen_down = bool(np.isfinite(b))
    return "".join(parts)
