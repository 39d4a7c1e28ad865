from __future__ import annotations

from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest

from torchprobe.statistics import counts, dense, dtypes


@contextmanager
def _in_pieces_of(size: int):
    patches = (
        *((dtypes, "CPU_PIECE", size), (dense, "PIECE", size)),
        *((counts, "SMALL", min(size, counts.SMALL)), (counts, "PORTION", 2 * size)),
    )
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        yield


@pytest.fixture(scope="session")
def in_pieces_of():
    """A context in which statistics work on so many elements at a time."""
    return _in_pieces_of
