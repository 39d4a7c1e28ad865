"""In which portions the logits are computed: small enough for a cache, or for a fraction of a device's memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

CPU_LOGITS_PER_THREAD = 2**17
"""Logits a thread works on at a time: they and the temporaries of one operation stay in L2."""

DEVICE_LOGITS = 2**24
"""Logits to work on at a time elsewhere: 64 MiB in float32."""

LONG_LOGITS = 2**23
"""No portion is larger than this for the sake of PRODUCT_ROWS, however long the rows are: 32 MiB in float32."""

PRODUCT_ROWS = 128
"""With fewer rows of one key head, their matrix product with the keys waits for the keys' memory."""


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


def budget(device: torch.device) -> int:
    """How many logits to work on at a time."""
    return CPU_LOGITS_PER_THREAD * torch.get_num_threads() if device.type == "cpu" else DEVICE_LOGITS


def parts(extent: Extent, size: int) -> Iterator[list[Part]]:
    """All of it in parts of about `size` logits: lists of parts that differ in their heads alone."""
    sequences, rows, key_heads = _steps(extent, size)
    for in_batch in _slices(extent.sequences, sequences):
        for in_rows in _slices(extent.rows, rows):
            yield [
                Part(in_batch, in_rows, slice(s.start * extent.group, s.stop * extent.group), s)
                for s in _slices(extent.key_heads, key_heads)
            ]


def _steps(extent: Extent, size: int) -> tuple[int, int, int]:
    """Sequences, rows and key heads of a part: several sequences, or rows and heads of one."""
    _, rows, key_heads, group, keys, width = extent
    sequence = key_heads * keys * max(group * rows, width)  # of logits or of keys: those of a part may be copied
    if sequence <= size:
        return size // sequence, rows, key_heads
    row = group * keys
    step = max(1, size // (row * key_heads), min(-(-PRODUCT_ROWS // group), LONG_LOGITS // row))
    step = min(rows, step)
    return 1, step, max(1, min(key_heads, size // (row * step)))


def _slices(total: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]
