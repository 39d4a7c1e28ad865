"""A value far above its recent past: what the loss and the gradient norm share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchprobe.arguments import check_count
from torchprobe.records import Record
from torchprobe.rules.alert import Alert
from torchprobe.rules.reading import Found, loss_of, positive
from torchprobe.rules.window import Window


class Spike:
    """More than `deviations` standard deviations above the mean of the last `window` values, once there are as many.

    Source: the stability monitor of OLMo-core. Costs a pass over the window for each value.
    """

    name = "spike"
    tags: tuple[str, ...] = ()
    what = "value"

    def __init__(self, deviations: float = 6.0, window: int = 128) -> None:
        self.deviations = positive("deviations", deviations)
        self.window = check_count("window", window)
        self._seen: dict[str, Window] = {}

    def state_dict(self) -> dict[str, Any]:
        """The windows, for a resumed run."""
        return {tag: window.state_dict() for tag, window in self._seen.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        for tag, window in state.items():
            self._seen.setdefault(tag, Window(self.window)).load_state_dict(window)

    def __call__(self, record: Record) -> Found:
        """Compares the value with those before it, and then counts it among them."""
        found = loss_of(record, self.tags)
        if found is None:
            return None
        tag, value = found
        seen = self._seen.setdefault(tag, Window(self.window))
        limit = seen.limit(self.deviations) if seen.full else None
        seen.add(value)
        if limit is None or not value > limit:
            return []
        message = (
            f"{self.what} is more than {self.deviations:g} standard deviations above its last {self.window} values"
        )
        return [Alert(self.name, record.step, None, value, limit, message)]
