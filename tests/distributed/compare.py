"""Compares what two runs recorded, tag by tag."""

from __future__ import annotations

from typing import Any

import numpy as np


def differences(found: dict[str, Any], expected: dict[str, Any], rel: float = 1e-3, tight: float = 0.0) -> list[str]:
    """What differs by more than `rel`, or is missing on either side: a line each."""
    lines = [f"missing: {tag}" for tag in sorted(set(expected) - set(found))]
    lines += [f"too many: {tag}" for tag in sorted(set(found) - set(expected))]
    for tag in sorted(set(expected) & set(found)):
        if set(expected[tag]) != set(found[tag]):
            lines.append(f"{tag}: steps {sorted(found[tag])} instead of {sorted(expected[tag])}")
            continue
        for step, value in expected[tag].items():
            lines += _difference(f"{tag} step {step}", found[tag][step], value, rel)
    return lines


def _difference(where: str, found: Any, expected: Any, rel: float) -> list[str]:
    if isinstance(expected, dict):
        close = _same_histogram(found, expected)
    else:
        close = np.allclose(found, expected, rtol=rel, atol=1e-6, equal_nan=True)
    return [] if close else [f"{where}: {found} instead of {expected}"]


def _same_histogram(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """As many elements, and all but two in the same bucket: rounding moves one across an edge now and then."""
    if sum(found["counts"]) != sum(expected["counts"]):
        return False
    if len(found["edges"]) != len(expected["edges"]) or not np.allclose(found["edges"], expected["edges"], atol=1e-5):
        return False
    return int(abs(np.subtract(found["counts"], expected["counts"])).sum()) <= 4
