"""Text as fixed-length rows of word numbers, without a vocabulary to learn or to ship."""

from __future__ import annotations

import re
import zlib

PADDING = 0

# assertEqual -> assert, Equal; HTTPServer -> HTTP, Server; other scripts stay whole words; punctuation counts too.
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^\W\d_]+|[^\w\s]")


def words_of(text: str) -> list[str]:
    """Lower-case words and punctuation marks; text that holds neither is one word of its own."""
    return [word.lower() for word in _WORD.findall(text)] or [text]


def word_numbers(text: str, length: int, vocabulary: int) -> list[int]:
    """The first `length` words as numbers in [1, vocabulary), filled up with `PADDING`.

    The number is the word's CRC-32, so it is the same in every process; words may share one.
    At least one number is not padding, so no attention row is ever fully masked.
    """
    numbers = [1 + zlib.crc32(word.encode()) % (vocabulary - 1) for word in words_of(text)[:length]]
    return numbers + [PADDING] * (length - len(numbers))
