"""Rows by name, on their devices, until they are handed to the buffer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from torchprobe.statistics import uncertainty
from torchprobe.statistics.dtypes import row_dtype
from torchprobe.statistics.uncertainty import Decomposition


class Tally:
    """Rows by name, added up on their devices. A name is `<form>|<rest>`: the evidence of a form says whether its rows
    count.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[torch.device, str], Tensor] = {}
        self._evidence: dict[str, Tensor] = {}
        self._sampled: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._rows or self._evidence)

    def add(self, name: str, row: Tensor, sampled: bool = False) -> None:
        """Add a row. Out of place: it may have been made in inference mode."""
        key = (row.device, name)
        self._rows[key] = row if key not in self._rows else self._rows[key] + row
        if sampled:
            self._sampled.add(name)

    def describe(self, name: str, *found: Tensor | None) -> None:
        """Add a row of uncertainty: total, aleatoric and epistemic, as far as they are known."""
        self.add(name, uncertainty.compute(Decomposition(*found, *[None] * (3 - len(found)))))

    def support(self, form: str, evidence: Tensor) -> None:
        """Add to what is known of a form: (3,), see `probes.evidence`."""
        before = self._evidence.get(form)
        if before is not None:  # what is in host memory goes to the device: the other way would wait
            device = evidence.device if before.is_cpu else before.device
            dtype = row_dtype(device)
            evidence = before.to(device, dtype, non_blocking=True) + evidence.to(device, dtype, non_blocking=True)
        self._evidence[form] = evidence

    def take_from(self, other: Tally) -> None:
        """All that another one holds, which is empty then."""
        if other is self:
            return
        rows, evidence, sampled = other.hand_over()
        for (_, name), row in rows.items():
            self.add(name, row, name in sampled)
        for form, found in evidence.items():
            self.support(form, found)

    def hand_over(self) -> tuple[dict[tuple[torch.device, str], Tensor], dict[str, Tensor], set[str]]:
        """Everything, to somebody else."""
        given = self._rows, self._evidence, self._sampled
        self._rows, self._evidence, self._sampled = {}, {}, set()
        return given

    def rows(self) -> Iterator[tuple[list[str], Tensor]]:
        """For each device the names and their rows with `EVIDENCE` behind."""
        groups: defaultdict[torch.device, list[str]] = defaultdict(list)
        for device, name in self._rows:
            groups[device].append(name)
        for device, names in groups.items():
            yield names, torch.stack([self._complete(device, name) for name in names])

    def _complete(self, device: torch.device, name: str) -> Tensor:
        row = self._rows[device, name]
        evidence = self._evidence.get(name.partition("|")[0], row.new_zeros(3))
        sampled = row.new_full((1,), float(name in self._sampled))
        return torch.cat((row, evidence.to(device, row_dtype(device), non_blocking=True), sampled))
