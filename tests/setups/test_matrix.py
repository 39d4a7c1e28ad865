"""The same numbers under the same tags, whatever the set-up (see `matrix`)."""

from __future__ import annotations

import pytest

from tests.setups.matrix import cases, outcome


@pytest.mark.parametrize(("family", "setup"), cases())
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles")  # inductor of torch 2.6
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which Dynamo hides by itself, unless it is an error
def test_a_set_up_gives_the_numbers_of_the_plain_eager_run(family, setup):
    found = outcome(family, setup)
    assert (found.missing, found.extra) == ([], [])
    assert found.worst < 1e-3, found.where
