from __future__ import annotations

from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest

from torchprobe.statistics import buckets, dense, dtypes


@contextmanager
def _in_chunks_of(size: int):
    small = min(size, buckets.SMALL)
    patches = ((dtypes, "CPU_CHUNK", size), (dense, "CHUNK", size), (buckets, "SMALL", small))
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        yield


@pytest.fixture(scope="session")
def in_chunks_of():
    """A context in which statistics work on so many elements at a time."""
    return _in_chunks_of
