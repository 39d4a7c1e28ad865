"""The same numbers under the same tags, whatever the set-up (see `matrix`)."""

from __future__ import annotations

import logging

import pytest

from tests.setups.matrix import SETUPS, Setup, batch, cases, loss, outcome
from torchprobe.capture.compiled.tracing import TRACES_GRADIENT_HOOKS

LIMIT = 1e-3  # float32 itself is within 4e-7 of float64 here


@pytest.mark.parametrize(("family", "setup"), cases())
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which Dynamo hides by itself, unless it is an error
def test_a_set_up_gives_the_numbers_of_the_plain_eager_run(family, setup, caplog):
    if "compile" in setup and not TRACES_GRADIENT_HOOKS:
        pytest.skip("graphs of this torch take no hooks of tensors inside them")
    found = outcome(family, SETUPS[setup])
    assert (found.missing, found.extra) == ([], [])
    assert found.worst < LIMIT, found.where
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_set_up_that_trains_on_a_row_less_is_told_apart():
    def short_step(model, optimizer, k):
        optimizer.zero_grad()
        x, target = batch(model, k)
        loss(model, x[1:], target[1:]).backward()
        optimizer.step()

    assert outcome("mlp", Setup(step=short_step)).worst > 10 * LIMIT
