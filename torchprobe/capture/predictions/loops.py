"""Which loops of the user's program validate: told by the lines that lead to the model's call."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TypeAlias

from torch import Tensor

from torchprobe.capture.predictions.phase import Moment, Phase

Place: TypeAlias = "tuple[tuple[str, int], ...]"
"""Files and lines of the calls that are under way, the innermost first."""

_MOST_FRAMES = 32
_MERGED = (
    "validation: {}: data sets are recorded together, as nothing tells them apart; those that the model is called for "
    "from lines of their own are written apart as well"
)


class Loops:
    """The places that the model was called from in one validation, in their order: each is a loop of its own unless one
    comes again after another, as two calls a batch do.

    Of loops that nothing tells apart, such as one function that is called for each data set, a full batch after a
    smaller one tells that there are several, or that random numbers were drawn between some batches.
    """

    def __init__(self) -> None:
        self._places: list[Place] = []
        self.mixed = False
        self.line = ""
        """What is to be said of them."""
        self._sizes: list[int] = []
        self._drawn: set[bool | None] = set()  # between passes

    def enter(self) -> int:
        """A pass begins: the number of its loop, from 0."""
        place = calling_lines()
        if not self.mixed and place not in self._places:
            self._places.append(place)
            self._sizes, self._drawn = [], set()
        self.mixed |= place != self._places[-1]
        return 0 if self.mixed else len(self._places) - 1

    def drew(self, drawn: bool | None) -> None:
        """Whether random numbers were drawn before a pass, as they are where a `DataLoader` begins."""
        if self._sizes:
            self._drawn.add(drawn)
        if not self.line and {True, False} <= self._drawn:
            self.line = _MERGED.format(
                "random numbers were drawn before some of its batches alone, as where a DataLoader begins"
            )

    def mix(self) -> None:
        """They are one after all."""
        self.mixed = True

    def saw(self, size: int) -> None:
        """The number of examples of a pass."""
        if not self.line and self._sizes and size == self._sizes[0] > self._sizes[-1]:
            self.line = _MERGED.format(
                f"a batch of {size} came after one of {self._sizes[-1]}, as where one data set follows another"
            )
        self._sizes = [*self._sizes[:1], size]

    def end(self) -> None:
        """All passes have come."""
        if len(self._places) > 1 and not self.mixed:
            names = ", ".join(f"loop_{i} {where}" for i, where in enumerate(_differences(self._places), 1))
            self.line = (
                f"validation: the model was called from several places, one after the other ({names}): what each gave "
                "is written apart under these names, and without a name what all of them gave together"
            )


class Validation:
    """What the passes of a validation give, by loop."""

    def __init__(self) -> None:
        self._phases: list[Phase] = []
        self._loops = Loops()

    def enter(self, moment: Moment) -> Phase:
        """A pass begins: the phase that it belongs to."""
        number = self._loops.enter()
        if self._loops.mixed:
            self._mix()
        elif number == len(self._phases):
            self._phases.append(Phase(False, moment))
        return self._phases[-1]

    @property
    def last(self) -> list[Phase]:
        """The phase of the last pass, if there was one."""
        return self._phases[-1:]

    @property
    def before(self) -> list[Phase]:
        """That of the loop before, which a pass over the same input goes on in."""
        return self._phases[-2:-1]

    def goes_on_before(self) -> None:
        """It does: two lines call the model for one batch."""
        self._phases.pop()
        self._mix()

    def drew(self, drawn: bool | None) -> None:
        """A pass is about to run: whether random numbers were drawn since the one before."""
        self._loops.drew(drawn)

    def saw(self, inputs: Sequence[Tensor]) -> None:
        """A pass has returned, with these tensors for an input."""
        if inputs and inputs[0].dim():
            self._loops.saw(len(inputs[0]))

    def end(self) -> tuple[list[Phase], str]:
        """All passes have come: their phases, by loop, and what is to be said."""
        self._loops.end()
        return self._phases, self._loops.line

    def _mix(self) -> None:
        self._loops.mix()
        *others, last = self._phases
        for phase in others:
            last.absorb(phase)
        self._phases = [last]


def calling_lines() -> Place:
    """Where the program is. Costs about 5 µs."""
    frame: FrameType | None = sys._getframe(1)
    lines: list[tuple[str, int]] = []
    while frame is not None and len(lines) < _MOST_FRAMES:
        lines.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return tuple(lines)


def _differences(places: Sequence[Place]) -> list[str]:
    """Of each place the innermost line that is not the same in all of them."""
    for lines in zip(*places, strict=False):
        if len(set(lines)) == len(places):
            return [f"{Path(file).name}:{number}" for file, number in lines]
    return ["" for _ in places]
