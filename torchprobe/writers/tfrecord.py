"""TFRecord framing: what TensorBoard's loaders expect around every event."""

from __future__ import annotations

import struct

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
