"""DistributedDataParallel: one run, with the numbers of one process on the joined batch."""

from __future__ import annotations

import pytest

from tests.distributed import training as t
from tests.distributed.compare import differences
from tests.distributed.launch import launch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch("tests.distributed.ddp_scenarios", 2, tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("how", ["plain", "static graph", "unused parameters", "bucket views", "model", "model before"])
def test_every_number_is_that_of_the_joined_batch(ranks, how):
    expected = t.alone([[t.tokens(k)] for k in range(t.STEPS)])
    assert differences(ranks[0][how], expected) == []


def test_only_rank_0_writes(ranks):
    assert set(ranks[1]["plain"]) == set()
