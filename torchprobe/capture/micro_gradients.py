"""Gradients of micro-batches: what each backward pass of a step adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias
from weakref import ReferenceType

import torch
from torch import Tensor, nn

from torchprobe.buffer.step import Piece, Share
from torchprobe.capture.sharding import Named, is_unreduced, local_part, share_of
from torchprobe.naming import named_parameters
from torchprobe.probes.base import Probe, Reporter
from torchprobe.probes.checks import combined
from torchprobe.statistics.dtypes import measurable

KeptRows: TypeAlias = "dict[tuple[Reporter, torch.device], dict[str, Tensor]]"


class MicroGradientSource:
    """Copies the gradients when a backward pass begins, and measures the difference when it has ended.

    Costs a copy of all gradients and a subtraction, on sampled steps, where a probe of this source is due.
    """

    names = ("micro_gradients",)

    def __init__(
        self,
        model: ReferenceType[nn.Module],
        reporters: Sequence[Reporter],
        wanted: Callable[[Sequence[Named], Probe], list[Named]],
    ) -> None:
        self._model = model
        self._reporters = [r for r in reporters if r.source == "micro_gradients"]
        self._wanted = wanted
        self._before: dict[str, Tensor] | None = None
        self._shares: dict[str, Share] = {}  # of gradients, which may lie otherwise than their parameters

    def begin(self, due: frozenset[Reporter]) -> None:
        """A backward pass begins."""
        if self._reporters and not due.isdisjoint(self._reporters):
            self._before = {name: gradient.clone() for name, _, gradient in self._gradients()}

    def end(self, due: frozenset[Reporter]) -> KeptRows:
        """It has ended: rows by parameter."""
        kept: KeptRows = {}
        before, self._before = self._before, None
        if before is None:
            return kept
        with torch.no_grad():
            added = [
                Named(name, p, gradient - before[name] if name in before else gradient)
                for name, p, gradient in self._gradients()
            ]
        self._shares.update((name, share_of(p if p.grad is None else p.grad)) for name, p, _, _ in added)
        for reporter in self._reporters:
            if reporter in due and not reporter.gate.failed:
                with reporter.gate.boundary(), torch.no_grad():
                    for name, _, gradient, _ in self._wanted(added, reporter.probe):
                        row = reporter.probe.measure(gradient)
                        kept.setdefault((reporter, row.device), {})[name] = row
        return kept

    def merge(self, a: KeptRows, b: KeptRows) -> KeptRows:
        """The rows of two backward passes together."""
        for key, rows in b.items():
            mine = a.setdefault(key, {})
            for name, row in rows.items():
                with key[0].gate:
                    mine[name] = combined(key[0].probe, mine[name], row) if name in mine else row
        return a

    def rows(self, kept: KeptRows, scale: float | Tensor | None) -> list[Piece]:
        """As rows for the buffer. scale: what the gradients were multiplied with."""
        pieces = []
        for (reporter, _), rows in kept.items():
            if reporter.gate.failed:
                continue
            with reporter.gate:
                stacked, of = torch.stack(list(rows.values())), [self._shares[name] for name in rows]
                piece = Piece(reporter, list(rows), stacked, shares=of)
                pieces.append(piece if scale is None else piece.unscaled(scale))
        return pieces

    def _gradients(self) -> list[tuple[str, nn.Parameter, Tensor]]:
        held = ((name, p, p.grad) for name, p in named_parameters(self._model()) if p.grad is not None)
        return [(name, p, local_part(g.detach())) for name, p, g in held if not is_unreduced(g) and measurable(g)]
