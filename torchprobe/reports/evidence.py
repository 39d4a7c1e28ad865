"""What a verdict stands on: the layers at either end, training against validation, the best and the last, the times."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from torchprobe.reports.events import Series
from torchprobe.reports.run import Run

_WORST = 5  # layers of each kind
_LOWER_IS_BETTER = ("loss", "nll", "error", "perplexity", "ppl", "ece", "brier", "mse", "mae", "rmse", "wer")
_HIGHER_IS_BETTER = (
    *("accuracy", "acc", "top1", "top5", "f1", "auc", "auroc", "precision", "recall", "bleu", "iou", "dice"),
)
_WHOLE_MODEL = ("train", "overview", "calibration", "test", "eval")  # groups whose losses and accuracies are of it
_EXTREMES = {  # a title, the group, and whether the largest or the smallest values are the worst
    "largest gradients": ("grad_norm_layer", max),
    "smallest mean gradients": ("grad_mean_abs", min),
    "largest update ratios": ("update_ratio", max),
    "smallest update ratios": ("update_ratio", min),
    "most zeros in the output": ("activation_zero_fraction", max),
    "largest attention logits": ("attention_max_logit", max),
}


def layers(run: Run) -> dict[str, list[dict[str, Any]]]:
    """The layers to look at, by what is said of them."""
    return {title: _extremes(run.group(group), worst) for title, (group, worst) in _EXTREMES.items()}


def _extremes(group: Mapping[str, Series], worst: Any) -> list[dict[str, Any]]:
    """The worst layers, each with the step of its worst value, and how often it was exactly 0, of how many."""
    rows = [{"where": name, **_worst_of(series, worst)} for name, series in group.items() if len(series.values)]
    found = [row for row in rows if row["value"] is not None and (row["value"] or worst is min)]
    return sorted(found, key=lambda row: row["value"], reverse=worst is max)[:_WORST]


def _worst_of(series: Series, worst: Any) -> dict[str, Any]:
    """0 is the smallest where it has settled at 0 (a dead layer), not where it was 0 in passing (a warm-up's start).

    The step of a dead layer is the one since which it is dead.
    """
    values, zero = series.values, series.values == 0
    keep = np.isfinite(values) & (~zero if worst is min and series.settled != 0 else True)
    counts = {"zeros": int(zero.sum()), "points": int(values.size)}
    if not keep.any():
        return {"value": None, "step": None, **counts}
    places = np.flatnonzero(keep)
    at = places[(np.argmin if worst is min else np.argmax)(values[keep])]
    if zero[at] and zero[-1]:
        at = np.flatnonzero(~zero).max(initial=-1) + 1
    return {"value": number(values[at]), "step": int(series.steps[at]), **counts}


def both_parts(run: Run) -> dict[str, dict[str, Any]]:
    """Of what is recorded in training and in validation, the last value of each at or before the last validation."""
    names = {**_pairs(run, "train/"), **_pairs(run, "calibration/", "val/calibration/")}
    found = {name: (run.scalars[train], run.scalars[val]) for name, (train, val) in names.items()}
    return {name: _at_one_step(train, val) for name, (train, val) in sorted(found.items())}


def _pairs(run: Run, train: str, val: str = "val/") -> dict[str, tuple[str, str]]:
    rest = [tag.removeprefix(train) for tag in run.scalars if tag.startswith(train)]
    return {name: (train + name, val + name) for name in rest if val + name in run.scalars and name != "count"}


def _at_one_step(train: Series, val: Series) -> dict[str, Any]:
    step = int(val.steps[-1])
    trained, last = train.until(step).last, val.last
    gap = number(last - trained) if math.isfinite(trained) and math.isfinite(last) else None
    return {"step": step, "train": number(trained), "validation": number(last), "gap": gap}


def final_and_best(run: Run) -> dict[str, dict[str, Any]]:
    """Of losses and accuracies, by their names: the last value, and the best one with its step."""
    found = {}
    for tag, series in sorted(run.scalars.items()):
        words = set(re.split(r"[/_.-]", tag.lower()))
        lowest, highest = bool(words & {*_LOWER_IS_BETTER}), bool(words & {*_HIGHER_IS_BETTER})
        finite = np.flatnonzero(np.isfinite(series.values))
        if lowest == highest or tag.startswith("best/") or not finite.size or not is_of(_WHOLE_MODEL, tag):
            continue
        best = finite[(np.argmin if lowest else np.argmax)(series.values[finite])]
        found[tag] = {
            "final": number(series.last),
            "final_step": int(series.steps[-1]),
            "best": number(series.values[best]),
            "best_step": int(series.steps[best]),
            "better": "lower" if lowest else "higher",
        }
    return found


def is_of(groups: Collection[str], tag: str) -> bool:
    """Whether a tag is of the whole run, rather than of one layer: without a group, or in one of these."""
    group, slash, _ = tag.removeprefix("val/").partition("/")
    return not slash or group in groups


def performance(run: Run) -> dict[str, dict[str, float]]:
    """Median and 95th percentile of the times, rates and bytes of a step."""
    found = {}
    for name, series in sorted(run.group("performance").items()):
        if series.finite.size:
            found[name] = {"median": float(np.median(series.finite)), "p95": float(np.percentile(series.finite, 95))}
    return found


class Table(NamedTuple):
    """Columns' names, and rows of texts and numbers."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[Any]]


def tables(summary: Mapping[str, Any]) -> Iterator[Table]:
    """What a verdict stands on, by layers, metrics and times."""
    rows = [
        [title, row["where"], row["value"], row["step"], f"{row['zeros']} of {row['points']}" if row["zeros"] else ""]
        for title, found in summary["layers_to_look_at"].items()
        for row in found[:3]
    ]
    yield Table("Layers to look at", ("what", "where", "value", "step", "exactly 0"), rows)
    best = _columns(summary["final_and_best"], "final", "best", "best_step", "better")
    yield Table("Final and best", ("tag", "final", "best", "at step", "better is"), best)
    both = _columns(summary["train_against_validation"], "train", "validation", "gap", "step")
    yield Table("Training against validation", ("what", "training", "validation", "gap", "step"), both)
    times = _columns(summary["performance"], "median", "p95")
    yield Table("Performance", ("what", "median", "95th percentile"), times)


def _columns(found: Mapping[str, Mapping[str, Any]], *keys: str) -> list[list[Any]]:
    return [[name, *(row[key] for key in keys)] for name, row in found.items()]


def number(value: float) -> float | None:
    """None for what is not finite, as JSON has no name for it."""
    return float(value) if math.isfinite(value) else None
