from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import pytest

from torchprobe.statistics import dense, dtypes


@contextmanager
def _in_pieces_of(size: int):
    with mock.patch.object(dtypes, "CPU_PIECE", size), mock.patch.object(dense, "PIECE", size):
        yield


@pytest.fixture(scope="session")
def in_pieces_of():
    """A context in which statistics work on so many elements at a time."""
    return _in_pieces_of
