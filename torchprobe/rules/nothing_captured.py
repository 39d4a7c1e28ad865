"""A probe that was asked for sees nothing."""

from __future__ import annotations

from torchprobe.records import Record, Text
from torchprobe.rules.alert import Alert
from torchprobe.rules.reading import Found

GROUP = "nothing_captured/"


class NothingCaptured:
    """A requested probe saw nothing in its first three sampled steps; the message says which and why.

    Reads the texts `nothing_captured/<Probe>`. Of the default probes, one that a model need not have anything for
    (attention, say) is not reported.
    """

    name = "nothing_captured"

    def __init__(self) -> None:
        self._found: list[Alert] = []

    def __call__(self, record: Record) -> Found:
        """One alert a probe, which does not end."""
        self._found += [
            Alert(self.name, record.step, tag.removeprefix(GROUP), 0.0, None, value.markdown)
            for tag, value in record.values.items()
            if tag.startswith(GROUP) and isinstance(value, Text)
        ]
        return self._found or None
