"""Checks of what a user passes to `instrument`: each error names the argument, what it got and what it takes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable


def check_number(argument: str, value: object, takes: str, fits: Callable[[float], bool]) -> None:
    """Raise TypeError or ValueError unless `value` is a number that fits. takes: what does, in words."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{argument}={value!r}: takes {takes}, not {type(value).__name__}")
    if not fits(value):
        raise ValueError(f"{argument}={value}: takes {takes}")


def check_positive(argument: str, value: object) -> None:
    """Raise unless `value` is a finite number above 0."""
    check_number(argument, value, "a number above 0", lambda number: 0 < number < math.inf)


def check_timeout(value: object) -> None:
    """Raise unless `timeout=` is None or a number of seconds, 0 or more."""
    if value is not None:
        takes = "a number of seconds, 0 or more, or None for no limit"
        check_number("timeout", value, takes, lambda seconds: seconds >= 0)


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
