"""The log "torchprobe", which never raises: a handler that does, or a stderr that is closed, costs the line alone."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any


class Log(logging.LoggerAdapter):  # type: ignore[type-arg] # Python 3.10's takes no parameter
    """A logger as everywhere, but for what its handlers raise."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """All other methods come here. The line is the caller's."""
        with suppress(Exception):
            super().log(level, msg, *args, **{"stacklevel": 2, **kwargs})


log = Log(logging.getLogger("torchprobe"), {})
