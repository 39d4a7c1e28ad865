"""Every framework: weights and random state are bitwise those of the bare run; steps, losses and norms are its own.

What is not installed is skipped. To add a framework: a function in `frameworks`, and a line in the table there.
"""

from __future__ import annotations

import pytest
import torch

from tests.setups.frameworks import FRAMEWORKS, LOSS_UNKNOWN, LOSS_UNKNOWN_AT_FIRST
from tests.setups.frameworks.run import trained
from tests.setups.reference import l2

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the frameworks warn about one another
    pytest.mark.timeout(120),
]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_framework_trains_as_ever_and_its_steps_are_recorded(framework, tmp_path):
    bare, weights, random_state = trained(FRAMEWORKS[framework], tmp_path, watched=False)
    run, watched, watched_state = trained(FRAMEWORKS[framework], tmp_path, watched=True)
    assert all(map(torch.equal, weights, watched))
    assert torch.equal(random_state, watched_state)
    assert run.session.step == len(bare.steps) > 1
    losses = {k: step.loss for k, step in enumerate(bare.steps, 1) if framework not in LOSS_UNKNOWN}
    losses = {k: loss for k, loss in losses.items() if k > 1 or framework not in LOSS_UNKNOWN_AT_FIRST}
    assert dict(run.writer.scalars("overview/loss")) == pytest.approx(losses, rel=1e-5, abs=1e-7)
    norms = {k: l2(*step.gradients.values()) for k, step in enumerate(bare.steps, 1)}
    assert dict(run.writer.scalars("overview/grad_norm")) == pytest.approx(norms, rel=1e-5)
    unseen = [line for line in run.session.summary().splitlines() if "nothing captured" in line]
    assert any("Loss" in line for line in unseen) == (framework in LOSS_UNKNOWN)
