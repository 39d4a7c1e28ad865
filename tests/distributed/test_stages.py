"""What a module of a pipeline's stage is called: one rule for the whole run, whatever is heard of it."""

from __future__ import annotations

import numpy as np
import pytest

from torchprobe.buffer.step import Stage
from torchprobe.distributed.mailbox import Part
from torchprobe.distributed.merge import StageNames


def stage(place: int, *names: str, stages: int = 2, before: str = "") -> Stage:
    """With parameters `<name>.w`."""
    inner = {before + part: part for name in names for part in (name, f"{name}.w")}
    return Stage(
        place, stages, [0, 1], {before.rstrip(".") or "root": "root", **inner}, [f"{name}.w" for name in names]
    )


def names(known: StageNames, rank: int, *local: str) -> list[str]:
    (part,) = known.of(rank, [Part("0", "", local, np.zeros((len(local), 1)))])
    return list(part.names)


def test_names_of_their_own_stay():
    known = StageNames({0: [stage(0, "a")], 1: [stage(1, "b")]})
    assert names(known, 0, "a", "a.w", "root", "|unjudged") == ["a", "a.w", "stage0", "|unjudged"]
    assert names(known, 1, "b.w", "root") == ["b.w", "stage1"]


def test_one_name_in_common_and_all_stages_are_told_apart():
    known = StageNames({0: [stage(0, "a", "b")], 1: [stage(1, "b", "c")]})
    assert names(known, 0, "a", "b.w", "root") == ["stage0.a", "stage0.b.w", "stage0"]
    assert names(known, 1, "c") == ["stage1.c"]


def test_copies_of_a_stage_have_the_same_names():
    known = StageNames({0: [stage(0, "a")], 1: [stage(1, "b")], 2: [stage(0, "a")], 3: [stage(1, "b")]})
    assert names(known, 2, "a") == ["a"]


def test_a_stage_that_was_not_heard_of_may_have_the_same_names():
    assert names(StageNames({0: [stage(0, "a")], 1: []}), 0, "a") == ["stage0.a"]


def test_several_stages_of_a_rank():
    rank_0 = [stage(0, "x", stages=4, before="0."), stage(2, "x", stages=4, before="1.")]
    rank_1 = [stage(1, "x", stages=4, before="0."), stage(3, "x", stages=4, before="1.")]
    known = StageNames({0: rank_0, 1: rank_1})
    assert names(known, 0, "0.x", "1.x.w", "1") == ["stage0.x", "stage2.x.w", "stage2"]
    assert names(known, 1, "0.x", "1") == ["stage1.x", "stage3"]


@pytest.mark.parametrize(("stages", "expected"), [({0: [stage(0, "a")]}, [0, 1]), ({}, ())])
def test_ranks_of_a_pipeline_see_the_same_examples(stages, expected):
    assert StageNames(stages).on_same_data(0, ()) == expected
