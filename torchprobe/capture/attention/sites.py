"""What the attention calls of a step add up to, site by site."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchprobe.capture.attention.owner import Path
from torchprobe.capture.attention.reading import Reading
from torchprobe.statistics.attention import combine


class Site(NamedTuple):
    """An attention of a module. Calls that agree in all of this are merged."""

    module: str
    path: Path
    cross: bool
    heads: int
    device: torch.device


class Found(NamedTuple):
    """A site's statistics of one step.

    rows: (heads, fields), merged over all calls; sampled: whether a call's query rows were a sample, which makes
    its max logit a lower bound; kept: what `on_source` returned for the first of the calls that it did for.
    """

    name: str
    rows: Tensor
    sampled: bool
    kept: Tensor | None


class Sites:
    """Merges readings; names sites at the end of the step, and keeps to the names from then on.

    A module's only attention has the module's name. Of a module that does both, cross-attention has `/cross`
    added; further ones of the same kind, at other call sites, `/2`, `/3` and so on.
    """

    def __init__(self) -> None:
        self._names: dict[Site, str] = {}
        self._readings: dict[bool, dict[Site, Reading]] = {True: {}, False: {}}

    def add(self, site: Site, reading: Reading, training: bool) -> None:
        """Merge one more call."""
        readings = self._readings[training]
        before = readings.get(site)
        readings[site] = reading if before is None else _merged(before, reading)

    def collect(self, training: bool) -> list[Found]:
        """The sites of the step or of the validation pass, in the order of their first calls; starts anew."""
        readings, self._readings[training] = self._readings[training], {}
        if not readings:
            return []
        self._name(list(readings))
        return [Found(self._names[site], r.rows, r.sampled, r.kept) for site, r in readings.items()]

    def _name(self, sites: list[Site]) -> None:
        kinds = {(site.module, site.cross) for site in (*self._names, *sites)}
        for site in sites:
            if site not in self._names:
                both = (site.module, not site.cross) in kinds
                self._names[site] = self._unused(site.module + ("/cross" if site.cross and both else ""))

    def _unused(self, name: str) -> str:
        taken = set(self._names.values())
        candidates = (name if n == 1 else f"{name}/{n}" for n in range(1, len(taken) + 2))
        return next(candidate for candidate in candidates if candidate not in taken)


def _merged(a: Reading, b: Reading) -> Reading:
    kept = b.kept if a.kept is None else a.kept
    return Reading(combine(a.rows, b.rows), a.sampled or b.sampled, kept)
