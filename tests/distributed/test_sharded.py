"""Sharded models: the numbers of the whole model, from the parts that the ranks hold."""

from __future__ import annotations

import pytest

from tests.distributed import training as t
from tests.distributed.compare import differences
from tests.distributed.launch import launch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch("tests.distributed.sharded_scenarios", 4, tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def whole():
    return t.alone([[t.tokens(k)] for k in range(t.STEPS)], make=t.scaled)


@pytest.mark.parametrize("how", ["blocks and root", "instrumented before", "not resharded", "root only", "hybrid"])
def test_fully_shard(ranks, whole, how):
    found = ranks[0][how]
    assert found.pop("dropped") == 0
    assert differences(found, whole) == []
