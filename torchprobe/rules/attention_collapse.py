"""A head looks at a single key."""

from __future__ import annotations

from torchprobe.records import Record
from torchprobe.rules.alert import Alert
from torchprobe.rules.reading import Found, group, positive, scalar


class AttentionCollapse:
    """A head's mean entropy is below `threshold` nats. Source: Zhai et al. 2023 on entropy collapse.

    Attention in which every query sees one key only has no entropy to lose and is left alone.
    """

    name = "attention_collapse"

    def __init__(self, threshold: float = 0.1) -> None:
        self.threshold = positive("threshold", threshold)

    def __call__(self, record: Record) -> Found:
        """One alert a module, with the entropy of its lowest head."""
        entropies = dict(group(record, "attention_entropy_min"))
        if not entropies:
            return None
        message = "a head attends to hardly more than one key: its mean entropy in nats is below the threshold"
        return [
            Alert(self.name, record.step, module, entropy, self.threshold, message)
            for module, entropy in entropies.items()
            if entropy < self.threshold and scalar(record, f"attention_entropy_normalized/{module}") is not None
        ]
