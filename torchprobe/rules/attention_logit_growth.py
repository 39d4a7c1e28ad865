"""Attention logits grow until the softmax saturates."""

from __future__ import annotations

from torchprobe.records import Record
from torchprobe.rules.alert import Alert
from torchprobe.rules.reading import Found, group, positive


class AttentionLogitGrowth:
    """The largest signed logit of an attention, after scale and mask, is above `threshold` (the default of QK-clip)."""

    name = "attention_logit_growth"

    def __init__(self, threshold: float = 100.0) -> None:
        self.threshold = positive("threshold", threshold)

    def __call__(self, record: Record) -> Found:
        """One alert a module."""
        logits = dict(group(record, "attention_max_logit"))
        if not logits:
            return None
        message = "the largest attention logit is above the threshold: the softmax saturates"
        return [
            Alert(self.name, record.step, module, logit, self.threshold, message)
            for module, logit in logits.items()
            if logit > self.threshold
        ]
