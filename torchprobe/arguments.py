"""Checks of what a user passes to `instrument`: each error names the argument, what it got and what it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable


def checked_budget(fraction: float | None) -> float | None:
    """A fraction of wall time, or None. Raises TypeError or ValueError for anything else."""
    if fraction is None:
        return None
    if isinstance(fraction, bool) or not isinstance(fraction, int | float):
        raise TypeError(f"overhead_budget={fraction!r}: takes a fraction of wall time, such as 0.01")
    if not 0 < fraction <= 1:
        raise ValueError(f"overhead_budget={fraction}: takes a fraction of wall time between 0 and 1, such as 0.01")
    return fraction


def check_seconds(argument: str, value: float) -> None:
    """Raise unless `value` is a number of seconds above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{argument}={value!r}: takes seconds, not {type(value).__name__}")
    if not value > 0:
        raise ValueError(f"{argument}={value}: takes a number of seconds above 0")


def check_timeout(value: object) -> None:
    """Raise unless `timeout=` is None or a number of seconds, 0 or more."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"timeout={value!r}: takes seconds, or None for no limit, not {type(value).__name__}")
    if not value >= 0:
        raise ValueError(f"timeout={value}: takes a number of seconds, 0 or more, or None for no limit")


def check_count(argument: str, value: object, of: str = "steps") -> int:
    """`value` itself when it is a whole number of at least 1, else an error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}={value!r}: takes a whole number of {of}, 1 or more, not {type(value).__name__}")
    if value < 1:
        hint = " (1 is every step)" if of == "steps" else ""
        raise ValueError(f"{argument}={value}: takes a whole number of {of}, 1 or more{hint}")
    return value


def check_callable(argument: str, function: Callable[..., object], takes: str, *given: str) -> None:
    """Raise TypeError unless it is a function, no class, of so many arguments. takes: what is taken, in words."""
    if isinstance(function, type):
        raise TypeError(f"{argument}={function!r}: takes {takes}; this is a class")
    try:
        inspect.signature(function).bind(*given)
    except TypeError as error:
        call = f"this one cannot be called with ({', '.join(given)}): {error}"
        raise TypeError(f"{argument}={function!r}: takes {takes}; {call}") from None
    except ValueError:  # a built-in that does not say what it takes
        return


def checked_patterns(argument: str, value: str | Iterable[str], example: str) -> tuple[str, ...]:
    """One pattern or several, as a tuple. Raises TypeError, with an example, for what is no string."""
    patterns = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument}: got {pattern!r}; takes module-name patterns, such as {example!r}")
    return patterns
