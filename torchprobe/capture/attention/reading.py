"""What is computed at an attention call, and kept until the step ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from torchprobe.capture.gate import no_autocast
from torchprobe.statistics.attention import Source, compute, is_sampled

OnSource: TypeAlias = "Callable[[str, Source, torch.Generator], Tensor | None]"


@dataclass(frozen=True, slots=True)
class Reading:
    """rows: (heads, fields) of the statistic; kept: what `on_source` returned for the call."""

    rows: Tensor
    sampled: bool
    kept: Tensor | None


class Reader:
    """Computes the statistic of a source, outside of the user's autocast and random numbers."""

    def __init__(self, rows: int | Literal["all"], on_source: OnSource | None) -> None:
        self._rows = rows
        self._on_source = on_source
        self._generators: dict[torch.device, torch.Generator] = {}

    def read(self, name: str, source: Source) -> Reading:
        """The reading of one call; name: of the module that owns it."""
        device = source.device
        generator = self._generator(device)
        with no_autocast(device):
            rows = compute(source, self._rows, generator)
            kept = None if self._on_source is None else self._on_source(name, source, generator)
        return Reading(rows, is_sampled(source, self._rows), kept)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            try:
                generator = torch.Generator(device)
            except RuntimeError:  # not every backend has generators of its own
                generator = torch.Generator()
            self._generators[device] = generator.manual_seed(0)  # so that a run can be repeated
        return self._generators[device]
