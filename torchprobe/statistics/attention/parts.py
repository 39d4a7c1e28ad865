"""In which portions the logits are computed: small enough for a cache, or for a fraction of a device's memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

CPU_LOGITS_PER_THREAD = 2**18
"""Logits a thread works on at a time: they and the temporaries of one operation are about the size of L2."""

DEVICE_LOGITS = 2**24
"""Logits to work on at a time elsewhere: 64 MiB in float32."""

PRODUCT_ROWS = 64
"""With fewer rows of one key head, their matrix product with the keys waits for the keys' memory."""

LONG = 2**23
"""Logits and distances that are made at a time for the sake of PRODUCT_ROWS, however many keys: 32 MiB in float32."""


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
    """All of it, in lists of parts that differ in their heads alone; for `pieces` to cut to `size` logits."""
    sequences, rows, key_heads = _steps(extent, size)
    for in_batch in _slices(0, extent.sequences, sequences):
        for in_rows in _slices(0, extent.rows, rows):
            yield [
                Part(in_batch, in_rows, slice(s.start * extent.group, s.stop * extent.group), s)
                for s in _slices(0, extent.key_heads, key_heads)
            ]


def pieces(part: Part, keys: int, size: int) -> list[Part]:
    """The part in portions of about `size` logits, that differ in their rows alone."""
    heads, key_heads = _length(part.heads), _length(part.key_heads)
    row = keys * heads * _length(part.sequences)
    step = max(1, size // row, min(PRODUCT_ROWS * key_heads // heads, LONG // row))
    return [part._replace(rows=rows) for rows in _slices(part.rows.start, part.rows.stop, step)]


def _steps(extent: Extent, size: int) -> tuple[int, int, int]:
    """Sequences, rows and key heads of a part: whole sequences, or rows and heads of one."""
    _, rows, key_heads, group, keys, width, causal = extent
    row = group * keys
    sequence = key_heads * max(row * rows, keys * width)  # logits, or keys: those of several sequences are copied
    if sequence <= size:
        return size // sequence, rows, key_heads
    rows = min(rows, max(1, LONG // keys))
    product = min(rows, max(1, PRODUCT_ROWS // group)) if causal else rows  # few rows: they see fewer keys
    return 1, rows, min(key_heads, max(1, size // (row * product)))


def _length(s: slice) -> int:
    return int(s.stop) - int(s.start)


def _slices(start: int, stop: int, step: int) -> list[slice]:
    return [slice(at, min(at + step, stop)) for at in range(start, stop, step)]
