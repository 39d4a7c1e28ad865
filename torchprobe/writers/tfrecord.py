"""TFRecord framing: what TensorBoard's loaders expect around every event."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

import google_crc32c

_MASK_DELTA = 0xA282EAD8


def frame(data: bytes) -> bytes:
    """One record: length, masked CRC of the length, data, masked CRC of the data; little-endian.

    Format: the comment above `RecordWriter` in TensorFlow's `lib/io/record_writer.h`.
    """
    length = struct.pack("<Q", len(data))
    return b"".join((length, _checksum(length), data, _checksum(data)))


def _checksum(data: bytes) -> bytes:
    """CRC-32C, rotated right by 15 bits plus a constant, so that a CRC of a CRC stays meaningful."""
    crc = int(google_crc32c.value(data))
    rotated = crc >> 15 | crc << 17
    return struct.pack("<I", rotated + _MASK_DELTA & 0xFFFFFFFF)


def records_of(file: BinaryIO) -> Iterator[bytes | None]:
    """The whole records from where the file stands, up to its end or to one that is torn; the file stands behind each.

    None for one that is damaged, where another one follows it: what comes last may be half written yet.
    """
    start, end = file.tell(), file.seek(0, os.SEEK_END)
    file.seek(start)
    while _is_sound(header := file.read(12)):
        (length,) = struct.unpack("<Q", header[:8])
        if length + 4 > end:  # no room is made for what cannot be there
            return
        body = file.read(length + 4)
        if len(body) == length + 4 and _checksum(body[:-4]) == body[-4:]:
            yield body[:-4]
            continue
        behind, follows = file.tell(), _is_sound(file.read(12))
        file.seek(behind)
        if not follows:
            return
        yield None


def _is_sound(header: bytes) -> bool:
    return len(header) == 12 and _checksum(header[:8]) == header[8:]
