"""Calls of attention whose statistics cannot be had: counted, and each reason told once."""

from __future__ import annotations

import logging
from collections import Counter

_log = logging.getLogger("torchprobe")


def unknown_shapes(module: str) -> str:
    """The reason where a call succeeded with shapes that cannot be told apart into batch, heads and rows."""
    return f"calls in {module}, whose shapes are of no known form"


class Uncovered:
    """How often each reason was met."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, reason: str) -> None:
        """One more call; the first of a reason is logged."""
        if not self.counts[reason]:
            _log.warning("attention is not recorded for %s; the model runs as ever", reason)
        self.counts[reason] += 1
