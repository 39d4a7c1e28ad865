"""A rank that dies, lags or is gone costs a timeout and its own values, never the run."""

from __future__ import annotations

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed.launch import launch


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("rough")


@pytest.fixture(scope="module")
def ranks(out):
    last = launch("tests.distributed.rough_scenarios", 3, out)
    return [
        json.loads(path.read_text()) if path.exists() else None for path in (out / f"so-far-{i}.json" for i in range(3))
    ] + [last]


def test_the_others_finish_when_a_rank_is_killed(ranks):
    assert ranks[2] is None
    assert ranks[0]["die"]["detached"]
    assert ranks[1]["die"]["detached"]


def test_the_file_has_every_step_with_the_values_of_the_ranks_that_were_there(ranks, out):
    events = EventAccumulator(str(out / "run"), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("overview/grad_norm")] == [1, 2, 3, 4, 5, 6]
    assert len(list((out / "run").glob("events.*"))) == 1


def test_a_rank_that_lags_costs_a_timeout(ranks):
    found = ranks[0]["lag"]
    assert found["flushed"]
    assert found["detached"]
    assert 1 in found["absent"]
    assert set(found["values"]["overview/grad_norm"]) == {"1", "2", "3"}


def test_training_goes_on_without_rank_0_and_its_store(ranks):
    assert ranks[3][1]["lost"] == {"steps": 4, "trained": True}
    assert ranks[3][0] is None
