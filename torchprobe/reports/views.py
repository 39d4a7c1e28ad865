"""What the page and the Probe tab show of a run, as plain data that both draw with the same script (`web/views.js`).

Arrays travel as base64 of little-endian float32 or int32, in which NaN and inf are what they are.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchprobe.reports.events import Series
from torchprobe.reports.evidence import tables
from torchprobe.reports.run import Run
from torchprobe.reports.summary import endings, headline, listed
from torchprobe.reports.verdict import named

_MOST_POINTS = 1500  # of a curve
_MOST_STEPS = 500  # of a heat map
_MOST_PICTURES = 12  # of a tag
_MOST_ELEMENTS = 2_000_000  # of all heads of all statistics and steps
_OURS = (  # what groups by layer begin with
    *("grad", "activation", "attention", "update_ratio", "param", "dead_units", "layers", "uncertainty", "momentum"),
    *("weight_decay", "gradients", "optimizer", "router", "nonfinite"),
)
_HEADS = "attention_heads/"
_WHOLE_RUN = ("overview", "train", "val", "best", "ood", "calibration", "lr", "performance", "router_entropy")
_LEADING = ("loss", "grad_norm", "grad_norm_unclipped", "update_ratio")  # of their group
_COUNTS = ("param_norm", "clipped_fraction", "alerts", "skipped_steps", "dropped_records", "probe_overhead")  # last
_LAYERS = (  # title, groups of which the first that is there is shown, whether on a log axis
    ("Gradient norm by layer", ("grad_norm_layer", "grad_norm"), True),
    ("Update ratio by parameter", ("update_ratio",), True),
    ("Activation RMS by layer", ("activation_rms",), True),
    ("Attention entropy by layer, nats", ("attention_entropy",), False),
    ("Gradient norm of outputs by layer", ("activation_grad_norm",), True),
    ("Activation kurtosis by layer", ("activation_kurtosis",), False),
)
_PICTURES = (
    ("Reliability and risk against coverage", ("calibration_reliability", "calibration_risk_coverage")),
    ("Attention maps", ("attention_map",)),
)


def views_of(run: Run, summary: Mapping[str, Any], *, all_heads: bool = True) -> dict[str, Any]:
    """All that is shown of a run, for `json.dumps`.

    all_heads: with the values of attention heads, of as many steps as fit into 8 MB; else the page asks for those of a
    step (`heads_at`) when it shows it.
    """
    return {
        "name": summary["run"],
        "headline": headline(summary),
        "endings": list(endings(summary)),
        "state": summary["state"],
        "steps": summary["steps"],
        "hparams": listed(summary["hparams"]),
        "verdict": summary["verdict"],
        "next_steps": summary["next_steps"],
        "alerts": _alerts(summary),
        "curves": [_curve(tag, run.scalars[tag]) for tag in _curve_tags(run)],
        "layers": list(_heat_maps(run)),
        "heads": list(_heads(run, all_heads)),
        "pictures": list(_pictures(run)),
        "tables": [table._asdict() for table in tables(summary)],
    }


def _alerts(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One for each time that an illness began, in order."""
    found = [
        {
            **{key: one[key] for key in ("step", "until", "where", "last", "members")},
            **{"rule": alert["rule"], "name": named(alert["rule"]), "message": one["message"]},
            "advice": alert["advice"],
        }
        for alert in summary["alerts"]
        for one in alert["episodes"]
    ]
    return sorted(found, key=lambda alert: alert["step"])


def _curve_tags(run: Run) -> Iterator[str]:
    """Those of the whole model, in the order of `_WHOLE_RUN`."""
    by_group: dict[str, list[str]] = {}
    for tag in run.scalars:
        group, _, name = tag.partition("/")
        if group in ("lr", "calibration") or "/" not in name or tag.startswith(("val/overview/", "val/calibration/")):
            by_group.setdefault(group, []).append(tag)
    for group in (*_WHOLE_RUN, *(other for other in by_group if other not in _WHOLE_RUN and other != "alerts")):
        if group in _WHOLE_RUN or not group.startswith(_OURS):  # else a prefix of `log_metrics`
            yield from sorted(by_group.get(group, ()), key=lambda tag: (_place(tag), tag))


def _place(tag: str) -> int:
    name = tag.removeprefix("val/").partition("/")[2]
    return _COUNTS.index(name) + 1 if name in _COUNTS else -1 if name in _LEADING else 0


def _curve(tag: str, series: Series) -> dict[str, Any]:
    keep = thinned(series.values, _MOST_POINTS)
    group, _, name = tag.removeprefix("val/").partition("/")
    shown = f"val/{group}" if tag.startswith("val/") and name else tag.partition("/")[0]
    return {"tag": tag, "group": shown, "steps": _packed(series.steps[keep]), "values": _packed(series.values[keep])}


def thinned(values: NDArray[np.float64], most: int) -> NDArray[np.int64]:
    """Places of at most so many values: of every share the smallest, the largest, and the first that is not finite."""
    if len(values) <= most:
        return np.arange(len(values))
    kept = {0, len(values) - 1}
    for share in np.array_split(np.arange(len(values)), most // 3):
        finite = share[np.isfinite(values[share])]
        if finite.size:
            kept |= {int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])}
        if finite.size < share.size:
            kept.add(int(share[~np.isfinite(values[share])][0]))
    return np.array(sorted(kept))


def _heat_maps(run: Run) -> Iterator[dict[str, Any]]:
    for title, groups, log in _LAYERS:
        found = next((series for group in groups if (series := run.group(group))), None)
        if found:
            order = {name: place for place, name in enumerate(_in_order(run))}
            found = {name: found[name] for name in sorted(found, key=lambda name: order.get(name, len(order)))}
            found = {name: series for name, series in found.items() if name != "root" or len(found) == 1}
            steps = _common(series.steps for series in found.values())
            rows = np.array([_on(series, steps) for series in found.values()])
            matrix = {"steps": _packed(steps), "values": _packed(rows), "shape": list(rows.shape)}
            yield {"title": title, "log": log, "layers": list(found), **matrix}


def _in_order(run: Run) -> list[str]:
    """Modules in the order in which they ran, and parameters in that of the model."""
    return [*run.group("activation_rms"), *run.group("grad_norm_layer"), *run.group("grad_norm")]


def _common(of_rows: Iterable[NDArray[np.int64]], most: int = _MOST_STEPS) -> NDArray[np.int64]:
    steps = np.unique(np.concatenate(list(of_rows)))
    keep = np.unique(np.linspace(0, len(steps) - 1, min(most, len(steps))).round().astype(np.int64))
    return np.asarray(steps[keep])


def _on(series: Series, steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """Its values at these steps, NaN where it has none, inf where they are not finite."""
    places = np.searchsorted(series.steps, steps).clip(max=len(series.steps) - 1)
    values = np.where(np.isfinite(series.values), series.values, np.inf)  # not finite, unlike not there
    return np.where(series.steps[places] == steps, values[places], np.nan)


def _heads(run: Run, with_values: bool) -> Iterator[dict[str, Any]]:
    """Every statistic of attention heads: steps by layers by heads."""
    tags = [tag for tag in run.tensors if tag.startswith(_HEADS)]
    for tag in tags:
        latest = _matrices(run, tag)
        shape = next(iter(latest.values())).shape
        if len(shape) != 2:
            continue
        room = max(_MOST_ELEMENTS // max(len(tags) * shape[0] * shape[1], 1), 1)
        steps = _common([np.array(list(latest), np.int64)], min(room, _MOST_STEPS) if with_values else _MOST_STEPS)
        values = np.array([latest[step] for step in steps.tolist()])
        finite = values[np.isfinite(values)]
        names = list(run.group("attention_entropy"))
        yield {
            "title": tag.removeprefix(_HEADS),
            "layers": names if len(names) == shape[0] else [f"layer {i}" for i in range(shape[0])],
            "steps": _packed(steps),
            "shape": [len(steps), *shape],
            "values": _packed(values) if with_values else None,
            "range": [float(finite.min()), float(finite.max())] if finite.size else [0.0, 1.0],
        }


def _matrices(run: Run, tag: str) -> dict[int, NDArray[np.float32]]:
    """By step in order, those of the latest shape."""
    points = run.tensors[tag]
    return {
        step: matrix
        for step, matrix in sorted(points, key=lambda point: point[0])
        if matrix.shape == points[-1][1].shape
    }


def heads_at(run: Run, statistic: str, step: int) -> str:
    """All heads at a step, as a page takes it. Raises KeyError where there is no such statistic or step."""
    return _packed(_matrices(run, f"{_HEADS}{statistic}")[step])


def _pictures(run: Run) -> Iterator[dict[str, Any]]:
    for title, groups in _PICTURES:
        for tag in sorted(run.images, key=lambda tag: (tag.removeprefix("val/"), tag)):
            if tag.removeprefix("val/").partition("/")[0] in groups:
                points = run.images[tag]
                keep = np.unique(np.linspace(0, len(points) - 1, _MOST_PICTURES).round().astype(np.int64))
                shown = [{"step": points[i][0], "png": b64encode(points[i][1]).decode()} for i in keep.tolist()]
                yield {"title": title, "tag": tag, "points": shown}


def _packed(array: NDArray[Any]) -> str:
    kind = "<i4" if array.dtype.kind in "iu" else "<f4"
    return b64encode(array.astype(kind).tobytes()).decode()


# ---- the page: one HTML file that needs nothing else, with Plotly inside

WEB = Path(__file__).parent / "web"
SCRIPTS = ("charts.js", "views.js")  # in this order


class MissingChartsError(ImportError):
    """The charts' library is not installed; the message says how to install it."""


def plotly_file() -> Path:
    """Plotly's script, which its Python package brings. Raises MissingChartsError where that is missing."""
    found = find_spec("plotly")  # which need not be imported for it
    file = Path(found.origin).parent / "package_data" / "plotly.min.js" if found and found.origin else None
    if file is None or not file.is_file():
        raise MissingChartsError("charts are drawn by plotly, which is not installed. Run: pip install plotly")
    return file


def page(run: Run, summary: Mapping[str, Any]) -> str:
    """The whole document, views by themselves. Raises MissingChartsError.

    Names in them are put on the page as text by the script, and cannot end its element here.
    """
    views = views_of(run, summary)
    data = json.dumps(views, allow_nan=False).replace("<", "\\u003c")
    ours = "\n".join((WEB / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>torchprobe: {escape(views['name'])}</title>"
        f"<style>{(WEB / 'views.css').read_text(encoding='utf-8')}</style></head>\n"
        f"<body><main id='views'></main><noscript><p>{escape(views['headline'])}</p></noscript>\n"
        f"<script>{plotly_file().read_text(encoding='utf-8')}</script>\n"
        f'<script type="application/json" id="data">{data}</script>\n'
        f"<script>{ours}\n"
        "torchprobe.show(document.getElementById('views'), [JSON.parse(document.getElementById('data').textContent)]);"
        "</script></body></html>\n"
    )
