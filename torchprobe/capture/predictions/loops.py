"""Which loops of the user's program validate: told by the lines that lead to the model's call."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TypeAlias
from weakref import ReferenceType, ref

from torch import Tensor, nn

from torchprobe.capture.predictions.phase import Moment, Phase

Place: TypeAlias = "tuple[tuple[str, int], ...]"
"""Files and lines of the calls that are under way, the innermost first."""

_MOST_FRAMES = 32
_MERGED = (
    "validation: {}: data sets are recorded together, as nothing tells them apart; those that the model is called for "
    "from lines of their own are written apart as well"
)
_GONE = (
    "calibration in validation: a loss module that judged some of the passes was gone before the next one, as one that "
    "is made at each call, and of others no targets were seen, so that nothing is recorded: make the loss module once, "
    "or call session.log_predictions(probs, targets)"
)


class Validation:
    """What the passes of a validation give, by loop.

    The places that the model is called from, in their order, are a loop each unless one comes again after another, as
    two calls a batch do. Of loops that nothing tells apart, such as one function that is called for each data set, a
    full batch after a smaller one tells that there are several, or that random numbers were drawn between some batches.
    """

    def __init__(self) -> None:
        self._phases: list[Phase] = []
        self._places: list[Place] = []
        self._mixed = False
        self._line = ""  # what is to be said of the loops
        self._sizes: list[int] = []
        self._drawn: set[bool | None] = set()  # between passes
        self._judge: ReferenceType[nn.Module] | None = None  # the loss module that was called last
        self._judge_gone: list[Phase] = []  # phases that went on without theirs

    def enter(self, moment: Moment) -> Phase:
        """A pass begins: the phase that it belongs to."""
        place = calling_lines()
        if not self._mixed and place not in self._places:
            self._places.append(place)
            self._sizes, self._drawn = [], set()
        if self._mixed or place != self._places[-1]:
            self._mix()
        elif len(self._places) > len(self._phases):
            self._phases.append(Phase(False, moment))
            self._judge = None
        if self._judge is not None and self._judge() is None:
            self._judge_gone.append(self._phases[-1])
        return self._phases[-1]

    def judged_by(self, module: nn.Module) -> list[Phase]:
        """A loss module was called: the phase of the last pass, if there was one."""
        self._judge = ref(module)
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
        """A pass is about to run: whether random numbers were drawn since the one before, as where a `DataLoader`
        begins.
        """
        if self._sizes:
            self._drawn.add(drawn)
        if not self._line and {True, False} <= self._drawn:
            self._line = _MERGED.format(
                "random numbers were drawn before some of its batches alone, as where a DataLoader begins"
            )

    def saw(self, inputs: Sequence[Tensor]) -> None:
        """A pass has returned, with these tensors for an input: how many examples it had."""
        if not inputs or not inputs[0].dim():
            return
        size = len(inputs[0])
        if not self._line and self._sizes and size == self._sizes[0] > self._sizes[-1]:
            self._line = _MERGED.format(
                f"a batch of {size} came after one of {self._sizes[-1]}, as where one data set follows another"
            )
        self._sizes = [*self._sizes[:1], size]

    def end(self) -> tuple[list[Phase], str]:
        """All passes have come: their phases, by loop, and what is to be said."""
        if len(self._places) > 1 and not self._mixed:
            names = ", ".join(f"loop_{i} {where}" for i, where in enumerate(_differences(self._places), 1))
            self._line = (
                f"validation: the model was called from several places, one after the other ({names}): what each gave "
                "is written apart under these names, and without a name what all of them gave together"
            )
        for phase in self._phases if self._judge_gone else ():
            phase.forget_waiting()
            if phase.unjudged and (self._mixed or phase in self._judge_gone):
                self._line = _GONE
                for one in phase.all_outputs():  # a part of the passes would stand for all
                    one.calibration.hand_over()
                    one.coverage.hand_over()
        return self._phases, self._line

    def _mix(self) -> None:
        self._mixed = True
        *others, last = self._phases
        for phase in others:
            last.absorb(phase)
        self._phases = [last]


def calling_lines() -> Place:
    """Where the program is. Costs about 5 µs."""
    frames = islice(traceback.walk_stack(sys._getframe(1)), _MOST_FRAMES)
    return tuple((frame.f_code.co_filename, line) for frame, line in frames)


def _differences(places: Sequence[Place]) -> list[str]:
    """Of each place the innermost line that is not the same in all of them."""
    for lines in zip(*places, strict=False):
        if len(set(lines)) == len(places):
            return [f"{Path(file).name}:{number}" for file, number in lines]
    return ["" for _ in places]
