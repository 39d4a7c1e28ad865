"""What frames of callers and their code say, the same on every Python."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Hashable, Iterator
from opcode import opmap
from types import CodeType, FrameType
from typing import Any

_READS_LOCALS = frozenset({"locals", "vars", "dir", "eval", "exec"})

_PARTS = frozenset({opmap.get("CACHE"), opmap["CALL"] if "PRECALL" in opmap else None})
"""What belongs to the instruction before it."""


def instruction_of(frame: FrameType) -> int:
    """At which instruction of its code a frame is.

    Python 3.11 and 3.12 replace instructions that run often by faster ones, some of which are at their end by then.
    """
    code, at = frame.f_code.co_code, frame.f_lasti
    while at > 0 and code[at] in _PARTS:
        at -= 2
    return at


def place_in(code: CodeType, at: int | None) -> tuple[Hashable, ...]:
    """What tells an instruction from all others: where two of one name are on one line, by its columns or its names."""
    names = () if sys.version_info >= (3, 11) else (code.co_names, code.co_varnames)  # which has columns
    return code.co_filename, code.co_firstlineno, code.co_name, code.co_linetable, names, at


def self_of(frame: FrameType) -> Any:
    """The `self` of a function, read without keeping the function's other locals alive."""
    code = frame.f_code
    if "self" not in code.co_varnames and "self" not in code.co_freevars:
        return None
    values = frame.f_locals
    found = values.get("self")
    if isinstance(values, dict) and code.co_flags & inspect.CO_OPTIMIZED and _READS_LOCALS.isdisjoint(code.co_names):
        values.clear()  # before Python 3.13 the frame keeps this snapshot, and so the user's logits, until it returns
    return found


def names_in(code: CodeType) -> Iterator[str]:
    """Names that it uses, those of code within it too: before Python 3.12 a comprehension is code of its own."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from names_in(inner)
