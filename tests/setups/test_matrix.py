"""The same numbers under the same tags, whatever the set-up (see `matrix`)."""

from __future__ import annotations

import pytest

from tests.setups.matrix import cases, outcome
from torchprobe.capture.compiled.tracing import TRACES_GRADIENT_HOOKS


@pytest.mark.parametrize(("family", "setup"), cases())
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which Dynamo hides by itself, unless it is an error
def test_a_set_up_gives_the_numbers_of_the_plain_eager_run(family, setup):
    if "compile" in setup and not TRACES_GRADIENT_HOOKS:
        pytest.skip("graphs of this torch take no hooks of tensors inside them")
    found = outcome(family, setup)
    assert (found.missing, found.extra) == ([], [])
    assert found.worst < 1e-3, found.where
