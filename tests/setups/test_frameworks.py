"""Every framework: weights and random state bitwise as without torchprobe; its steps, losses and norms as it computed them.

What is not installed here is skipped. A newcomer's place to add one: a function in `frameworks`, and a line in its table.
"""

from __future__ import annotations

import pytest
import torch

from tests.setups.frameworks import FRAMEWORKS, trained
from tests.setups.reference import l2

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the frameworks warn about one another
    pytest.mark.timeout(120),
]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_framework_trains_as_before_and_its_steps_are_recorded(framework, tmp_path):
    bare, weights, random_state = trained(FRAMEWORKS[framework], tmp_path, watched=False)
    run, watched, watched_state = trained(FRAMEWORKS[framework], tmp_path, watched=True)
    assert all(map(torch.equal, weights, watched))
    assert torch.equal(random_state, watched_state)
    assert run.session.step == len(bare.steps) > 1
    losses = {k: step.loss for k, step in enumerate(bare.steps, 1) if step.loss is not None}
    assert dict(run.writer.scalars("overview/loss")) == pytest.approx(losses, rel=1e-5, abs=1e-7)
    norms = {k: l2(*step.gradients.values()) for k, step in enumerate(bare.steps, 1)}
    assert dict(run.writer.scalars("overview/grad_norm")) == pytest.approx(norms, rel=1e-5)
