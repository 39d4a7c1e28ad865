"""Numbers of one step that diagnoses are decided by, until they leave the device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from torchprobe.buffer.step import Piece
from torchprobe.probes.base import Reporter
from torchprobe.statistics.dtypes import row_dtype


class Evidence:
    """Host facts and scalars on devices by name, `<fact>` or `<fact>/<where>`; of two of a name the later counts."""

    def __init__(self) -> None:
        self._facts: dict[str, float] = {}
        self._scalars: dict[str, Tensor] = {}

    def put(self, name: str, value: float | Tensor) -> None:
        """One number."""
        if isinstance(value, Tensor):
            self._scalars[name] = value.detach()
        else:
            self._facts[name] = float(value)

    def take(self, reporter: Reporter) -> Iterator[Piece]:
        """All of them as rows, a piece for each device; then there are none."""
        facts, scalars = self._facts, self._scalars
        self._facts, self._scalars = {}, {}
        if facts:
            rows = torch.tensor([*facts.values()], dtype=torch.float64, device="cpu")
            yield Piece(reporter, [*facts], rows.unsqueeze(1))
        devices: defaultdict[torch.device, dict[str, Tensor]] = defaultdict(dict)
        for name, scalar in scalars.items():
            devices[scalar.device][name] = scalar.to(row_dtype(scalar.device)).reshape(1)
        for rows_by_name in devices.values():
            yield Piece(reporter, [*rows_by_name], torch.stack([*rows_by_name.values()]))
