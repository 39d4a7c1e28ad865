"""A run's story in one dictionary, which `--json` prints, and in the sentences that every other form shares."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from time import time
from typing import Any

import numpy as np

from torchprobe.reports.events import Series, visible
from torchprobe.reports.evidence import both_parts, final_and_best, layers, number, performance
from torchprobe.reports.run import Run, json_of
from torchprobe.reports.verdict import episodes, next_steps, verdict

ROUNDING = 1e-6  # of a value: float32 numbers that are nearer to each other are the same
_MOST = 5  # files that could not be read, named one by one
_CURVES = ("overview", "train", "val", "best", "ood")
_COUNTS = ("overview/alerts", "overview/skipped_steps", "overview/dropped_records")
_UNCERTAIN = re.compile("(val/)?uncertainty_")
_SILENT = 600.0  # seconds without a new value, after which a run without an end was killed
_STOPPED_AT = re.compile(r"^recording stopped( at step \d+)?[:,.]? *", re.IGNORECASE)


def summarise(run: Run) -> dict[str, Any]:
    """Plain numbers, strings, lists and dictionaries; what is not finite is None, as JSON has no name for it."""
    told = _told(run)
    return {"verdict": verdict(told), "next_steps": next_steps(told), **told}


def _told(run: Run) -> dict[str, Any]:
    ends = layers(run)
    return {
        "run": visible(str(run.path)),
        **_state(run),
        "description": _facts(run),
        "stopped": _stopped(run),
        "hparams": run.hparams,
        "steps": run.steps,
        "seconds": round(run.seconds, 3),
        "steps_per_second": number(run.steps / run.seconds) if run.seconds > 0 else None,
        "counts": {tag.split("/")[1]: _count(run.scalars[tag]) for tag in _COUNTS if tag in run.scalars},
        "probe_overhead": _overhead(run),
        "curves": {tag: _curve(run.scalars[tag]) for tag in sorted(run.scalars) if _is_curve(tag)},
        "alerts": _alerts(run),
        "layers": {
            title: [{key: row[key] for key in ("where", "value")} for row in rows] for title, rows in ends.items()
        },
        "layers_to_look_at": ends,
        "attention_entropy": {name: _curve(series) for name, series in run.group("attention_entropy").items()},
        "calibration": {part: _last(run.group(f"{part}calibration")) for part in ("", "val/")},
        "uncertainty": _last({tag: run.scalars[tag] for tag in run.scalars if _UNCERTAIN.match(tag)}),
        "train_against_validation": both_parts(run),
        "final_and_best": final_and_best(run),
        "performance": performance(run),
        "unread": run.unread,
        "flight_recordings": run.flights,
    }


def _texts(run: Run, tag: str) -> list[tuple[int, str]]:
    """In our own files, and in those of a SummaryWriter."""
    return [*run.texts.get(tag, ()), *run.texts.get(f"{tag}/text_summary", ())]


def _facts(run: Run) -> dict[str, Any] | None:
    """What the run was: model, versions, script and so on, as `torchprobe.description` has them."""
    pages = _texts(run, "torchprobe/run")
    block = pages[-1][1].rpartition("```json\n")[2].partition("\n```")[0] if pages else ""
    try:
        facts = json_of(block)
    except ValueError:
        return None
    return facts if isinstance(facts, dict) else None


def _state(run: Run) -> dict[str, str | None]:
    """What has become of the run, as its last word has it; None where it has none, as with a writer of one's own."""
    words = _texts(run, "torchprobe/state")
    state, _, error = words[-1][1].partition(": ") if words else ("", "", "")
    if state == "running" and run.scalars and time() - run.times[1] > _SILENT:
        state = "killed"
    if state != "crashed" and _stopped(run) is not None:
        state = "stopped recording"
    return {"state": state or None, "exception": error or None}


def _stopped(run: Run) -> dict[str, Any] | None:
    """Where recording ended before the run did, and why: what the session wrote of it last."""
    said = _texts(run, "torchprobe/stopped")
    if not said:
        return None
    step, text = said[-1]
    return {"step": step, "why": _STOPPED_AT.sub("", " ".join(_unescaped(text).split()))}


def _count(series: Series) -> int:
    return int(series.last) if math.isfinite(series.last) else 0


def _is_curve(tag: str) -> bool:
    group, _, name = tag.partition("/")
    return group in _CURVES and "/" not in name and tag not in _COUNTS and name != "probe_overhead"


def _curve(series: Series) -> dict[str, Any]:
    finite = series.finite
    return {
        "first": number(series.values[0]),
        "last": number(series.last),
        "lowest": number(finite.min()) if finite.size else None,
        "highest": number(finite.max()) if finite.size else None,
        "points": len(series.values),
        "not_finite": int(series.values.size - finite.size),
    }


def _alerts(run: Run) -> list[dict[str, Any]]:
    """Per rule, in the order in which they first fired: the steps at which it did, and what it said last."""
    lines = [entry for _, text in _texts(run, "alerts") for entry in _plain(text)]
    found = []
    for rule, series in sorted(run.group("alerts").items(), key=lambda item: (item[1].steps[0], item[0])):
        said = [
            (line, advice) for line, advice in lines if line.startswith((f"{rule}, step ", f"{rule} has ended, step "))
        ]
        last = said[-1][0] if said else None
        advice = next((advice for _, advice in reversed(said) if advice), None)
        steps = series.steps.tolist()
        lasting = episodes(rule, steps, said)
        found.append({"rule": rule, "steps": steps, "said": last, "advice": advice, "episodes": lasting})
    return found


def _plain(markdown: str) -> Iterator[tuple[str, str]]:
    """The entries of a Markdown list without its escapes, each with what stands below it."""
    for entry in re.split(r"^- ", markdown, flags=re.MULTILINE)[1:]:
        said, _, below = _unescaped(entry).partition("\n")
        yield said, " ".join(below.replace("    - ", " ").split())


def _unescaped(markdown: str) -> str:
    return re.sub(r"\\([_*])", r"\1", markdown).replace("&lt;", "<")


def _last(named: Mapping[str, Series]) -> dict[str, float | None]:
    return {name: number(series.last) for name, series in sorted(named.items())}


def _overhead(run: Run) -> float | None:
    """The middle one of what was written every so many steps."""
    series = run.scalars.get("overview/probe_overhead")
    return None if series is None else number(float(np.median(series.values)))


def headline(summary: Mapping[str, Any]) -> str:
    """How long the run was, what recording took of it, and what there is to count."""
    seconds = summary["seconds"]
    parts = [f"{counted(summary['steps'], 'steps')} in {f'{seconds:.0f}' if seconds >= 10 else f'{seconds:.2g}'} s"]
    if summary["probe_overhead"] is not None:
        parts.append(f"{summary['probe_overhead']:.1%} of the time in probes")
    parts += [summary["state"]] if summary.get("state") in ("running", "finished", "interrupted", "ended") else []
    parts += [counted(count, name.replace("_", " ")) for name, count in summary["counts"].items() if count]
    return ", ".join(parts)


def endings(summary: Mapping[str, Any]) -> Iterator[str]:
    """That the run, its recording or the reading of it did not come to a good end."""
    step, stopped = summary["steps"], summary["stopped"]
    if summary["state"] == "crashed":
        yield f"Crashed at step {step}: {summary['exception']}"
    if summary["state"] == "killed":
        yield f"Not finished: killed after step {step}, or silent since then for over {_SILENT / 60:.0f} minutes"
    if stopped is not None:
        yield f"Recording stopped at step {stopped['step']}: {stopped['why']}"
    if unread := summary["unread"]:
        rest = f" and {len(unread) - _MOST} more" if len(unread) > _MOST else ""
        yield f"Not read, since damaged or of another program: {', '.join(unread[:_MOST])}{rest}"


def listed(hparams: Mapping[str, Any]) -> str:
    """Hyperparameters in a line."""
    return ", ".join(f"{name} {plain(value)}" for name, value in hparams.items())


def plain(value: Any) -> str:
    """A hyperparameter; TensorBoard keeps whole numbers as floats."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def reason(flight: Mapping[str, Any]) -> str:
    """Why a flight recording was made: the exception's last line, or the rules."""
    lines = str(flight.get("exception") or "").strip().splitlines()
    rules = sorted({str(alert.get("rule")) for alert in flight.get("alerts") or [flight.get("alert") or {}]} - {"None"})
    found = lines[-1:] or rules
    return f" ({visible(', '.join(found))})" if found else ""


def counted(count: int, plural: str) -> str:
    """`1 alert`, `2 alerts`."""
    return f"{count} {plural.removesuffix('s') if count == 1 else plural}"
