"""What no two runs have in common: seconds, and what is told by them."""

from __future__ import annotations

TIMED = ("overview/probe_overhead", "performance/")
"""How tags begin whose values a clock has made, or the memory of a process."""


def reproducible(tag: str) -> bool:
    """Whether equal runs have equal values under a tag."""
    return not tag.startswith(TIMED)
