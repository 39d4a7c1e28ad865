"""A planted bug is named, by the alert or remark of its rule, and by no other diagnosis than those that it causes."""

from __future__ import annotations

import pytest
import torch

import torchprobe
from tests.diagnoses.sick import REMARKS, SICK
from torchprobe.rules.diagnoses import DIAGNOSES
from torchprobe.testing import MemoryWriter

pytestmark = pytest.mark.filterwarnings("ignore")

CONSEQUENCES = {"at_chance", "large_initial_loss"}  # of other bugs
TOGETHER = {"unregistered_modules": {"detached_parameters"}}


def run(recipe, every):
    torch.manual_seed(0)
    session = recipe(lambda model: torchprobe.instrument(model, writer=MemoryWriter(), every=every))
    session.detach()
    return session


@pytest.mark.parametrize("every", [None, 10])
@pytest.mark.parametrize("name", SICK)
def test_a_bug_is_named(name, every):
    rule, recipe = SICK[name]
    session = run(recipe, every)
    named = {alert.rule for alert in session.alerts} & {diagnosis.name for diagnosis in DIAGNOSES}
    assert rule in named
    assert named - {rule} <= CONSEQUENCES | TOGETHER.get(rule, set())
    alert = next(alert for alert in session.alerts if alert.rule == rule)
    assert alert.advice


@pytest.mark.parametrize("name", REMARKS)
def test_what_may_be_meant_is_a_remark(name):
    rule, recipe = REMARKS[name]
    session = run(recipe, None)
    assert rule not in {alert.rule for alert in session.alerts}
    assert f"remark            {rule}" in session.summary()
