"""A run's summary in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def headline(summary: Mapping[str, Any]) -> str:
    """How long the run was, what recording took of it, and what there is to count."""
    seconds = summary["seconds"]
    parts = [f"{counted(summary['steps'], 'steps')} in {f'{seconds:.0f}' if seconds >= 10 else f'{seconds:.2g}'} s"]
    if summary["probe_overhead"] is not None:
        parts.append(f"{summary['probe_overhead']:.1%} of the time in probes")
    parts += [counted(count, name.replace("_", " ")) for name, count in summary["counts"].items() if count]
    return ", ".join(parts)


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
    return f" ({', '.join(found)})" if found else ""


def counted(count: int, plural: str) -> str:
    """`1 alert`, `2 alerts`."""
    return f"{count} {plural.removesuffix('s') if count == 1 else plural}"
