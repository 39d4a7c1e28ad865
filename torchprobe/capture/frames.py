"""What the callers of a hook are doing, read from their frames."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from types import CodeType, FrameType
from typing import Any


def running(
    code: CodeType, frame: FrameType | None = None, not_from: CodeType | None = None
) -> Iterator[Mapping[str, Any]]:
    """Local variables of each caller that runs this code, innermost first.

    frame: where to start; by default the caller. not_from: code whose own calls do not count. Costs 0.1 µs a frame.
    """
    at: FrameType | None = frame or sys._getframe(1)
    while at is not None:
        if at.f_code is code and (not_from is None or at.f_back is None or at.f_back.f_code is not not_from):
            yield at.f_locals
        at = at.f_back
