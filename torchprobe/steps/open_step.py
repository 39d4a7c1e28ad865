"""The step that is open: what it gathers until the next one begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from torchprobe.buffer.step import Piece, StepBuffer
from torchprobe.buffer.step import Reporter as Reports
from torchprobe.capture.nan_origin.check import Sign
from torchprobe.probes.base import Reporter
from torchprobe.records import Text, Value
from torchprobe.statistics.dtypes import on_host, row_dtype
from torchprobe.steps.backward import Backward

_UNHEARD = "an optimizer stepped on gradients of no backward() that was heard of since its last step"


@dataclass(slots=True)
class OpenStep:
    """Values and rows of a step, and the backward passes whose gradients its optimizers used.

    due: whose rows the step gives. light: probes of it that cost nothing, such as those of learning rates. loss: the
    sum of what the used backward passes were called on; None when there is none. scale: what it was multiplied with.
    """

    number: int
    due: frozenset[Reporter] = frozenset()
    light: frozenset[Reporter] = frozenset()
    values: dict[str, Value] = field(default_factory=dict)
    scalars: dict[str, Tensor] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    used: list[Backward] = field(default_factory=list)
    loss: float | Tensor | None = None
    unknown: bool = False  # a loss that is not known was used
    scale: float | Tensor | None = None
    parts: int = 1
    trained: bool = False  # an optimizer stepped, or a forward pass that is a step by itself ran
    reported: bool = False  # a record said what was due
    silent: bool = False  # it is not to be said
    loss_written: bool = False
    forwards: int = 0  # passes whose gradients are used
    ended: float | None = None  # when, on a clock without us
    _missing: Sequence[Reporter] = ()  # what was due
    _same_data: Sequence[int] = ()
    _urgent: bool = False
    _void: Tensor | None = None

    def put(self, tag: str, value: Value | Tensor) -> None:
        """A value under a tag; of two the later counts."""
        if isinstance(value, Tensor):
            self.scalars[tag] = value
            self.values.pop(tag, None)
        else:
            self.values[tag] = value
            self.scalars.pop(tag, None)

    def put_all(self, values: Iterable[tuple[str, Value | Tensor]]) -> None:
        """Values under their tags."""
        for tag, value in values:
            self.put(tag, value)

    def add(self, piece: Piece, combine: Callable[[Tensor, Tensor], Tensor] = torch.add) -> None:
        """Rows of a probe, together with those of the same names that are there, so that memory stays bounded."""
        for i, other in enumerate(self.pieces):
            if other.heading == piece.heading and other.rows.device == piece.rows.device:
                self.pieces[i] = replace(piece, rows=combine(other.rows, piece.rows))
                return
        self.pieces.append(piece)

    def put_sign(self, sign: Sign) -> None:
        """Its numbers are not finite, which is to be written at once."""
        self.put(f"nonfinite/{sign.of}", 1.0)
        if sign.finding is not None:
            self.put(f"provenance/{sign.finding.where}", Text(sign.finding.text))
        self._urgent = True

    def put_flags(self, reporter: Reports, flags: Mapping[str, Tensor]) -> None:
        """Flags on devices, by what they are of."""
        for of, flag in flags.items():
            self.add(Piece(reporter, [of], flag.to(row_dtype(flag.device)).reshape(1, 1)))

    def replace(self, piece: Piece) -> None:
        """Rows of a probe in place of earlier ones that have a name in common with them."""
        names, kind = set(piece.names), (piece.reporter, piece.prefix)
        others = [p for p in self.pieces if (p.reporter, p.prefix) != kind or names.isdisjoint(p.names)]
        self.pieces = [*others, piece]

    def extend(self, pieces: Iterable[Piece]) -> None:
        """Rows as they are."""
        self.pieces += pieces

    def use(self, *backwards: Backward) -> None:
        """The gradients of backward passes are used: each counts once, however many optimizers use it."""
        for backward in backwards:
            if not backward.used:
                self.forwards += backward.forwards
                if self.due:
                    self.used.append(backward)
            if backward.loss is None:
                self.unknown |= not (backward.elsewhere or backward.inner)  # part of another one's loss, or of none
            elif backward.counted != self.number:
                self.loss = backward.loss if self.loss is None else self.loss + backward.loss
            backward.take_for(self.number)

    def miss_loss(self) -> None:
        """Gradients are used of a loss that nobody has heard of."""
        self.unknown = True
        for reporter in self.light:
            if reporter.source == "loss":
                reporter.explain(_UNHEARD)

    def give_back(self) -> None:
        """What its optimizer was to use counts for nothing; validation does."""
        self.loss, self.unknown, self.used, self.forwards = None, False, [], 0
        self.pieces = [piece for piece in self.pieces if piece.prefix]

    def keep(self, backward: Backward) -> None:
        """Passes count whose backward pass nobody has heard of."""
        self.used.append(backward)
        self.forwards += backward.forwards
        backward.take_for(self.number)

    def scale_by(self, scale: Tensor) -> None:
        """The loss was multiplied by a GradScaler, whose scale changes in place."""
        self.scale = (on_host(scale) if scale.is_cpu else scale.clone()) * self.parts

    def divide_by(self, parts: int) -> None:
        """Gradients are of a sum over so many micro-batches, and are divided before the optimizer steps."""
        self.parts = self.scale = parts

    def end(self, with_gradients: bool = True, at: float | None = None) -> None:
        """An optimizer has stepped, or a forward pass was the step: without gradients some probes see nothing.

        at: when that was, where it is asked for.
        """
        self.trained = True
        self.silent = not with_gradients
        self.ended = at

    def void(self, flag: Tensor) -> None:
        """A flag on the device says whether the optimizer has skipped the step."""
        self._void = flag

    def compute_on(self, same_data: Sequence[int]) -> None:
        """Ranks that compute on the same examples."""
        self._same_data = same_data

    def become(self, number: int) -> None:
        """It was no step of training."""
        self.number = number

    def report(self, reporters: Sequence[Reporter], losses: Sequence[Reporter]) -> None:
        """Say what was due, once, in the order of all; a loss that is there need not be looked for."""
        self.reported = True
        if self.silent:
            return
        missing = [] if self.loss_written else [reporter for reporter in losses if reporter in self.light]
        self._missing = [*(reporter for reporter in reporters if reporter in self.due), *missing]

    def take_used(self) -> list[Backward]:
        """The backward passes whose rows are yet to be gathered."""
        used, self.used = self.used, []
        return used

    def take_loss(self) -> float | Tensor | None:
        """The loss of the step, unscaled, when all of it is known."""
        loss, self.loss = self.loss, None
        if loss is None or self.unknown:
            return None
        for reporter in self.light:
            if reporter.source == "loss":
                break
        else:
            return None
        self.loss_written = True
        return loss if self.scale is None else loss / self.scale

    def take_values(self) -> dict[str, Value] | None:
        """What there is of it, when it is a step as most are: host values, its loss among them, and nothing else."""
        loss = self.loss
        if self.due or self.used or self.pieces or self.scalars or self.unknown or not self.trained:
            return None
        if type(loss) is not float or self.scale is not None or self._void is not None or self._urgent:
            return None
        self.loss, self.loss_written = None, True
        values, self.values = self.values, {}
        values["overview/loss"] = loss
        return values

    def take(self) -> StepBuffer:
        """What was gathered so far; the step goes on with nothing."""
        taken = StepBuffer(
            self.values, self.scalars, self.pieces, self._missing, self._same_data, self._urgent, self._void
        )
        self.values, self.scalars, self.pieces = {}, {}, []
        self._missing, self._same_data, self._urgent, self._void = (), (), False, None
        return taken


def loss_rows(reporter: Reporter, loss: float | Tensor) -> Piece:
    """The loss as rows, which several ranks combine."""
    known = loss if isinstance(loss, Tensor) else torch.tensor(loss, dtype=torch.float64, device="cpu")
    return Piece(reporter, ["loss"], known.to(row_dtype(known.device)).reshape(1, 1))
