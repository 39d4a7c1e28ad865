"""Calls of attention whose statistics cannot be had: counted, and each reason told once."""

from __future__ import annotations

import logging
from collections import Counter

_log = logging.getLogger("torchprobe")


class Uncovered:
    """How often each reason was met."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, reason: str) -> None:
        """One more call; the first of a reason is logged."""
        if not self.counts[reason]:
            _log.warning("attention is not recorded for %s; the model runs as ever", reason)
        self.counts[reason] += 1
