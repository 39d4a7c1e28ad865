"""What a verdict stands on: the layers at either end, training against validation, the best and the last, the times."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from torchprobe.reports.events import Series
from torchprobe.reports.run import Run

_WORST = 5  # layers of each kind
_LOWER_IS_BETTER = ("loss", "nll", "error", "perplexity", "ppl", "ece", "brier", "mse", "mae", "rmse", "wer")
_HIGHER_IS_BETTER = (
    "accuracy",
    "acc",
    "top1",
    "top5",
    "f1",
    "auc",
    "auroc",
    "precision",
    "recall",
    "bleu",
    "iou",
    "dice",
)
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
    place = max(int(np.searchsorted(train.steps, step, side="right")) - 1, 0)
    pair = number(train.values[place]), number(val.last)
    gap = None if None in pair else number(float(val.last) - float(train.values[place]))
    return {"step": step, "train": pair[0], "validation": pair[1], "gap": gap}


def final_and_best(run: Run) -> dict[str, dict[str, Any]]:
    """Of losses and accuracies, by their names: the last value, and the best one with its step."""
    found = {}
    for tag, series in sorted(run.scalars.items()):
        words = set(re.split(r"[/_.-]", tag.lower()))
        lowest, highest = bool(words & {*_LOWER_IS_BETTER}), bool(words & {*_HIGHER_IS_BETTER})
        finite = np.flatnonzero(np.isfinite(series.values))
        if lowest == highest or tag.startswith("best/") or not finite.size or not _is_metric(tag):
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


def _is_metric(tag: str) -> bool:
    """Of the whole model, and not of another kind that is named so."""
    rest = tag.removeprefix("val/")
    return "/" not in rest or rest.partition("/")[0] in ("train", "overview", "calibration", "test", "eval")


def performance(run: Run) -> dict[str, dict[str, float]]:
    """Median and 95th percentile of the times, rates and bytes of a step."""
    found = {}
    for name, series in sorted(run.group("performance").items()):
        finite = series.values[np.isfinite(series.values)]
        if finite.size:
            found[name] = {"median": float(np.median(finite)), "p95": float(np.percentile(finite, 95))}
    return found


def number(value: float) -> float | None:
    """None for what is not finite, as JSON has no name for it."""
    return float(value) if math.isfinite(value) else None
