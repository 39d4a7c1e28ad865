"""A planted bug is named, by the alert or remark of its rule, and by no other diagnosis than those that it causes."""

from __future__ import annotations

import cProfile
import gc
import pstats
from itertools import count
from pathlib import Path
from random import Random

import pytest
import torch
from torch import nn

import torchprobe
from tests.diagnoses.data import batches, digits
from tests.diagnoses.recipes import adam, classify, mlp
from tests.diagnoses.sick import REMARKS, SICK
from torchprobe.rules.diagnoses import DIAGNOSES
from torchprobe.testing import MemoryWriter

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
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
    assert all(alert.advice for alert in session.alerts if alert.rule == rule and not alert.ended)


@pytest.mark.parametrize("name", REMARKS)
def test_what_may_be_meant_is_a_remark(name):
    rule, recipe = REMARKS[name]
    session = run(recipe, None)
    assert rule not in {alert.rule for alert in session.alerts}
    assert f"remark            {rule}" in session.summary()


def test_every_diagnosis_has_its_page_and_its_place_in_the_readme():
    page = " ".join((ROOT / "docs" / "diagnoses.md").read_text().split())
    readme = (ROOT / "README.md").read_text()
    for diagnosis in DIAGNOSES:
        assert f"## {diagnosis.name} **Symptom.** " in page, diagnosis.name
        assert f"**Fix.** {diagnosis.advice}" in page, diagnosis.name
        assert f"`{diagnosis.name}`" in readme, diagnosis.name
        assert f"(diagnoses/{diagnosis.name}.png)" in page, diagnosis.name
        assert (ROOT / "docs" / "diagnoses" / f"{diagnosis.name}.png").exists(), diagnosis.name


def test_every_diagnosis_has_a_planted_bug():
    named = {rule for rule, _ in (*SICK.values(), *REMARKS.values())}
    assert {diagnosis.name for diagnosis in DIAGNOSES} <= named


class Branches(nn.Module):
    """All of one input, which has no graph."""

    def __init__(self, number):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(4, 4) for _ in range(number))

    def forward(self, x):
        return torch.stack([branch(x) for branch in self.branches]).sum(0)


def calls_of_a_step(branches):
    model = Branches(branches)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gc.collect()
    gc.disable()  # what ends meanwhile calls, too
    try:
        with torchprobe.instrument(model, writer=MemoryWriter(), probes=[torchprobe.Diagnosis(every=1)], rules=[]):
            with cProfile.Profile() as profile:
                model(torch.ones(2, 4)).square().mean().backward()
            optimizer.step()
    finally:
        gc.enable()
    return pstats.Stats(profile).total_calls


def test_an_input_of_many_modules_is_looked_for_among_new_outputs_alone():
    few, some, many = (calls_of_a_step(number) for number in (20, 40, 80))
    assert many - some <= 2.2 * (some - few)


class Skipping(nn.Module):
    """Residual blocks that are skipped at random, the last of them more often: stochastic depth."""

    def __init__(self, *rates):
        super().__init__()
        self.rates, self.random, self.head = rates, Random(0), nn.Linear(64, 10)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in rates)

    def forward(self, x):
        for block, rate in zip(self.blocks, self.rates, strict=True):
            x = x if self.random.random() < rate else x + block(x)
        return self.head(x)


def skipping(steps, *rates, later=None):
    """The summary of a run in which rates are others after step 10."""
    model = Skipping(*rates)
    turns = count(1)

    def turn():
        model.rates = later if later and next(turns) >= 10 else model.rates

    watch = lambda model: torchprobe.instrument(model, writer=MemoryWriter(), every=1)  # noqa: E731
    session = classify(watch, model, adam(model), steps, after=turn)
    session.detach()
    return session.summary()


def test_parts_that_are_skipped_at_random_are_used():
    assert "unused_parameters" not in skipping(60, 0.2, 0.3, 0.4)


def test_a_part_that_is_never_used_beside_those_is_named():
    said = skipping(40, 0.2, 0.5, 1.0)
    assert said.count("unused_parameters") == 1
    assert "at blocks.2.0.weight to blocks.2.0.bias" in said


def test_a_part_that_is_not_used_any_more_is_named():
    assert "unused_parameters, step 16 at blocks.1.0.weight" in skipping(25, 0.0, 0.0, later=(0.0, 1.0))


@pytest.mark.parametrize("when", ["before", "in between"])
def test_parameters_that_loading_replaced_are_said_to_be_held_by_nobody(when):
    model = mlp()
    optimizer = adam(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if when == "before":
        model.load_state_dict(state, assign=True)
    session = torchprobe.instrument(model, writer=MemoryWriter(), every=2)
    for step, (x, y) in enumerate(batches(*digits(), steps=20), 1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if step == 8 and when == "in between":
            model.load_state_dict(state, assign=True)
    session.detach()
    rule = "nothing_captured" if when == "before" else "unoptimized_parameters"
    told = [alert for alert in session.alerts if alert.rule == rule and "load_state_dict(assign=True)" in alert.message]
    assert "Parameters" in [alert.where for alert in told] if when == "before" else len(told) == 1
