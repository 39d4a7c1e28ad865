"""In which portions the logits are computed: small enough for a cache, or for a fraction of a device's memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

CPU_LOGITS_PER_THREAD = 2**18
"""Logits a thread works on at a time: they and the temporaries of one operation stay in L2."""

DEVICE_LOGITS = 2**24
"""Logits to work on at a time elsewhere: 64 MiB in float32."""

PRODUCT_ROWS = 512
"""With fewer rows of one key head, their matrix product with the keys waits for the keys' memory."""

CAUSAL_ROWS = 64
"""With this many rows of one key head there are several parts, for the first of which the last keys are left out."""

PRODUCT_LOGITS = 2**23
"""No matrix product is larger than this for the sake of PRODUCT_ROWS, however many the keys: 32 MiB in float32."""


class Part(NamedTuple):
    """Some rows of some heads of some sequences; slices with a start and a stop, `heads` all of `key_heads`."""

    sequences: slice
    rows: slice
    heads: slice
    key_heads: slice


class Extent(NamedTuple):
    """What there is to do: sizes of the chosen rows, and of what they are multiplied with."""

    sequences: int
    rows: int
    key_heads: int
    group: int
    keys: int
    width: int
    causal: bool


def budget(device: torch.device) -> int:
    """How many logits to work on at a time."""
    return CPU_LOGITS_PER_THREAD * torch.get_num_threads() if device.type == "cpu" else DEVICE_LOGITS


def parts(extent: Extent, size: int) -> Iterator[list[Part]]:
    """All of it, in lists of parts that differ in their heads alone.

    A part has about `size` logits; or many rows of one key head, for the sake of the matrix product, and more
    logits: those are for `pieces`.
    """
    sequences, rows, key_heads = _steps(extent, size)
    for in_batch in _slices(0, extent.sequences, sequences):
        for in_rows in _slices(0, extent.rows, rows):
            yield [
                Part(in_batch, in_rows, slice(s.start * extent.group, s.stop * extent.group), s)
                for s in _slices(0, extent.key_heads, key_heads)
            ]


def pieces(part: Part, keys: int, size: int) -> Iterator[Part]:
    """The part in portions of at most `size` logits, or of one row a head, that differ in their rows alone."""
    row = keys * (part.heads.stop - part.heads.start) * (part.sequences.stop - part.sequences.start)
    for rows in _slices(part.rows.start, part.rows.stop, max(1, size // row)):
        yield part._replace(rows=rows)


def _steps(extent: Extent, size: int) -> tuple[int, int, int]:
    """Sequences, rows and key heads of a part: whole sequences, or rows and heads of one."""
    _, rows, key_heads, group, keys, width, causal = extent
    row = group * keys
    sequence = key_heads * max(row * rows, keys * width)  # logits, or keys: those of several sequences are copied
    if sequence <= size:
        return size // sequence, rows, key_heads
    step = max(1, size // row, min(PRODUCT_ROWS // group, PRODUCT_LOGITS // row))
    if causal:
        step = min(step, max(1, CAUSAL_ROWS // group, rows // 4))
    step = min(rows, step)
    return 1, step, min(key_heads, max(1, size // (row * step)))


def _slices(start: int, stop: int, step: int) -> list[slice]:
    return [slice(at, min(at + step, stop)) for at in range(start, stop, step)]
