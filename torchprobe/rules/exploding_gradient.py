"""The gradient grows out of all proportion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchprobe.arguments import check_count
from torchprobe.records import Record
from torchprobe.rules.alert import Alert
from torchprobe.rules.reading import Found, positive, scalar
from torchprobe.rules.window import Window


class ExplodingGradient:
    """The total norm is more than `factor` times the largest of the last `window` sampled values.

    Source: `is_unexpectedly_large` of Megatron-LM. Silent for the first `least` values, since gradients of a model that
    begins with zero weights grow by more than that in its first steps.
    """

    name = "exploding_gradient"

    def __init__(self, factor: float = 10.0, window: int = 128, least: int = 8) -> None:
        self.factor = positive("factor", factor)
        self.least = check_count("least", least)
        self._seen = Window(check_count("window", window))

    def state_dict(self) -> dict[str, Any]:
        """The window, for a resumed run."""
        return self._seen.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._seen.load_state_dict(state)

    def __call__(self, record: Record) -> Found:
        """Compares the norm with those before it, and then counts it among them."""
        norm = scalar(record, "overview/grad_norm")
        if norm is None:
            return None
        limit = self.factor * self._seen.largest() if len(self._seen) >= self.least else None
        self._seen.add(norm)
        if not limit or not norm > limit:
            return []
        message = f"the total gradient norm is over {self.factor:g} times the largest of the last {len(self._seen)}"
        return [Alert(self.name, record.step, None, norm, limit, message)]
