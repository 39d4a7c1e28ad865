"""What a rank has seen, as bytes: a JSON header with everything that is text, and the rows behind it.

A name travels once; from then on its number stands for it. Frames are compressed: rows of counts are mostly zeros.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchprobe.buffer.step import WHOLE, Share


class Key(NamedTuple):
    """A place in the order of what a rank hands over."""

    restart: int
    """How often step numbers began anew, as after forward passes that turned out to be no training."""
    step: int
    part: int
    """0 for a step's first record; more for what is logged to a step that was handed over already."""


class Numbering:
    """Gives each step that is handed over its key; two ranks that do the same get the same keys."""

    def __init__(self) -> None:
        self._last = Key(0, 0, 0)

    def next(self, step: int) -> Key:
        """The key of the step that is handed over now; keys increase."""
        restart, last, part = self._last
        if step > last:
            self._last = Key(restart, step, 0)
        else:
            self._last = Key(restart, step, part + 1) if step == last else Key(restart + 1, step, 0)
        return self._last


_HEADER_BYTES = 4


class Part(NamedTuple):
    """Rows of one probe from one rank: shape (len(names), fields)."""

    reporter: str
    prefix: str
    names: Sequence[str]
    rows: NDArray[np.float64]
    shards: Sequence[Share] | None = None


class Step(NamedTuple):
    """What a rank hands over at once."""

    key: Key
    parts: Sequence[Part]
    same_data: Sequence[int] = ()


@dataclass
class Frame:
    """A message: everything up to and including `mark` has been sent with it; `bye` says that nothing follows."""

    mark: Key | None = None
    steps: Sequence[Step] = field(default_factory=list)
    bye: bool = False


class FrameEncoder:
    """Makes bytes of frames, which one `FrameDecoder` must see in the same order."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def __call__(self, frame: Frame) -> bytes:
        """The bytes of a frame."""
        known = len(self._numbers)
        steps = [[step.key, list(map(self._described, step.parts)), list(step.same_data)] for step in frame.steps]
        header = {"mark": frame.mark, "bye": frame.bye, "steps": steps, "names": list(self._numbers)[known:]}
        text = json.dumps(header, separators=(",", ":")).encode()
        rows = [part.rows.astype("<f8", copy=False).tobytes() for step in frame.steps for part in step.parts]
        return zlib.compress(b"".join((len(text).to_bytes(_HEADER_BYTES, "little"), text, *rows)), 1)

    def _described(self, part: Part) -> list[Any]:
        names = [self._numbers.setdefault(name, len(self._numbers)) for name in part.names]
        plain = part.shards is not None and all(shard.is_whole for shard in part.shards)
        return [part.reporter, part.prefix, names, part.rows.shape[1], [] if plain else part.shards]


class FrameDecoder:
    """Reads frames in the order in which one `FrameEncoder` made them."""

    def __init__(self) -> None:
        self._names: list[str] = []

    def __call__(self, data: bytes) -> Frame:
        """The frame of some bytes. Raises ValueError or a kin of it for others."""
        raw = memoryview(zlib.decompress(data))
        end = _HEADER_BYTES + int.from_bytes(raw[:_HEADER_BYTES], "little")
        header = json.loads(bytes(raw[_HEADER_BYTES:end]))
        self._names += header["names"]
        numbers = np.frombuffer(raw[end:], dtype="<f8")
        steps = []
        for key, described, same_data in header["steps"]:
            parts, numbers = self._parts(described, numbers)
            steps.append(Step(Key(*key), parts, tuple(same_data)))
        return Frame(None if header["mark"] is None else Key(*header["mark"]), steps, header["bye"])

    def _parts(self, described: Iterable[Any], numbers: NDArray[Any]) -> tuple[list[Part], NDArray[Any]]:
        parts = []
        for reporter, prefix, indices, width, shards in described:
            size = len(indices) * width
            rows, numbers = numbers[:size].reshape(len(indices), width), numbers[size:]
            names = [self._names[i] for i in indices]
            parts.append(Part(reporter, prefix, names, rows.astype(np.float64), _shards(shards, len(names))))
        return parts, numbers


def _shards(described: list[Any] | None, size: int) -> list[Share] | None:
    if described is None:
        return None
    return [Share(*shard) for shard in described] if described else [WHOLE] * size
