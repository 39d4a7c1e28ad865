"""Over all programs of the corpus: how many claims can be right, how many of them are made, and that none is wrong."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.capture.predictions.test_corpus import RIGHT, TREACHEROUS, seen
from tests.capture.predictions.test_corpus_of_kinds import DECEIVING, KNOWN

CLAIMABLE = [*RIGHT, *KNOWN]


def claims() -> Iterator[tuple[bool, str]]:
    """Of each claim that can be right: whether it is made, and what is wrong with that."""
    for program in CLAIMABLE:
        torch.manual_seed(0)
        model, step = program.make()
        truths = program.truths(model)
        got = seen(model, step)
        for tag, truth in truths.items():
            made = tag in got.values
            right = got.values[tag] == pytest.approx(truth, rel=1e-3, abs=1e-5) if made else "not recorded" in got.said
            yield made, "" if right else f"{program.name}: {tag} is {got.values.get(tag)}, should be {truth}"


def test_no_claim_is_wrong_and_nine_of_ten_that_can_be_right_are_made():
    found = list(claims())
    wrong = [line for _, line in found if line]  # of the others each has a test of its own
    made = sum(made for made, _ in found)
    programs = len(CLAIMABLE) + len(TREACHEROUS) + len(DECEIVING)
    print(f"\n{programs} programs; {len(found)} claims can be right, {made} are made; {len(wrong)} are wrong")
    assert wrong == []
    assert programs >= 60
    assert made >= 0.9 * len(found)
