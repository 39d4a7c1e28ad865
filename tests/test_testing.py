import doctest

import torchprobe.testing
from torchprobe.writers.protocol import MemoryWriter


def test_the_documented_example_runs():
    result = doctest.testmod(torchprobe.testing)
    assert result.attempted >= 7
    assert result.failed == 0


def test_it_exports_the_test_double_alone():
    assert torchprobe.testing.__all__ == ["MemoryWriter"]
    assert torchprobe.testing.MemoryWriter is MemoryWriter
