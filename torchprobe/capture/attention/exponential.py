"""A softmax that is written out: exponentials, divided by their sum before or after they are multiplied with values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from torchprobe.capture.attention import functions as fn
from torchprobe.capture.attention.kinds import Exponentials, Normaliser, Pending, Weights

CHANGED = "a softmax by exp and sum whose exponentials are changed in between"


def carried(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], tag: Exponentials, part: Tensor) -> Any:
    """What a function makes of exponentials, unless it divides them: None where it cannot be told."""
    if func in fn.SUMS:
        return Normaliser(tag.pending) if _over_last(args, kwargs) and not tag.multiplied else None
    before: Any = args[0] if args else None
    if not isinstance(before, Tensor) or part.shape != before.shape:
        return None
    if func not in fn.VALUE_KEEPING and not tag.multiplied:
        tag.pending.reading, tag.pending.reason = None, CHANGED
    return tag


def divided(
    func: Any, args: tuple[Any, ...], of: Callable[[Any], Any], tag: Exponentials, commit: Callable[[Pending], None]
) -> tuple[bool, Weights | None]:
    """Whether exponentials have been divided by their sum, and the weights that this makes of them."""
    if func not in fn.DIVISIONS or len(args) < 2:
        return False, None
    sums = of(args[1])
    if not isinstance(sums, Normaliser) or sums.pending is not tag.pending:
        return False, None
    if not tag.multiplied:
        return True, Weights(tag.pending)
    commit(tag.pending)
    return True, None


def _over_last(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    last = args[0].dim() - 1 if args and isinstance(args[0], Tensor) else -1
    return dim in (-1, last, [-1], (-1,), [last], (last,))
