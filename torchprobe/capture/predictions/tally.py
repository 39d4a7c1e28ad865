"""Rows of a step or of a validation pass, added up by name, on their devices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from torchprobe.statistics.dtypes import row_dtype


class Tally:
    """Rows by name. A name is `<form>|<rest>`: the evidence of a form says whether its rows count."""

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

    def support(self, form: str, evidence: Tensor) -> None:
        """Add to what is known of a form: (3,), see `probes.evidence`."""
        before = self._evidence.get(form)
        self._evidence[form] = evidence if before is None else before + evidence.to(before.device)

    def rows(self) -> Iterator[tuple[torch.device, list[str], Tensor]]:
        """For each device the names and their rows with `EVIDENCE` behind."""
        groups: defaultdict[torch.device, list[str]] = defaultdict(list)
        for device, name in self._rows:
            groups[device].append(name)
        for device, names in groups.items():
            yield device, names, torch.stack([self._complete(device, name) for name in names])

    def _complete(self, device: torch.device, name: str) -> Tensor:
        row = self._rows[device, name]
        evidence = self._evidence.get(name.partition("|")[0])
        if evidence is None:
            evidence = row.new_zeros(3)
        sampled = row.new_full((1,), float(name in self._sampled))
        return torch.cat((row, evidence.to(device, row_dtype(device), non_blocking=True), sampled))
