"""How a plain output is read, once the host has decided on that."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torchprobe.capture.predictions.forms import Form

_ALL_AGAIN = 10  # sampled steps


class Settled:
    """Spares a sampled step what was decided against; in every tenth all possible forms are judged again.

    known: the key of the one form that was recognised, or None. That form itself is judged at every sampled step, so
    that it is known no longer once the loss is another one. Asked between steps, so that all passes of a step agree.
    """

    def __init__(self, known: Callable[[], str | None]) -> None:
        self._known = known
        self._key: str | None = None
        self._turn = 0

    def next_step(self) -> None:
        """A sampled training step is over."""
        self._turn = (self._turn + 1) % _ALL_AGAIN
        self._key = self._known() if self._turn else None

    def of(self, possible: Sequence[Form]) -> Sequence[Form]:
        """The form that was recognised, if it is among these; else all of them."""
        return [form for form in possible if form.key == self._key] or possible
