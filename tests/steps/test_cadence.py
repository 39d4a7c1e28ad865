"""Which steps are sampled when several optimizers take turns, and what an idle step costs."""

from __future__ import annotations

import gc
import itertools
import timeit

import pytest
import torch

import torchprobe
from torchprobe.capture.gate import Meter
from torchprobe.probes.choosing import default_probes
from torchprobe.steps.cadence import Plan


class Optimizers(dict):
    """One by each letter."""

    def __missing__(self, letter):
        self[letter] = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        return self[letter]


def plan_of(every=10, probes=None, **options):
    return Plan(probes or [torchprobe.Gradients(every=every)], None, None, Meter(), **options)


def sampled(plan, steps, optimizers=None, first=1):
    """The steps that a plan samples; steps: for each the letters of the optimizers that step in it."""
    optimizers, found = Optimizers() if optimizers is None else optimizers, []
    for step, letters in enumerate(steps, first):
        plan.open_for(step)
        if plan.due:
            found.append(step)
        for letter in letters:
            plan.optimizer_stepped(optimizers[letter])
    return found


def of_turns(*turns, steps=40):
    """Blocks of one optimizer each: ("D", 2), ("G", 1) is DDGDDG..."""
    return list(itertools.islice(itertools.cycle([letter for letter, count in turns for _ in range(count)]), steps))


def test_one_optimizer_is_sampled_at_the_cadence_alone():
    assert sampled(plan_of(), ["A"] * 35) == [1, 10, 20, 30]
    assert sampled(plan_of(), ["AB"] * 35) == [1, 10, 20, 30]  # which share their steps
    assert sampled(plan_of(), [""] * 35) == [1, 10, 20, 30]  # forward passes are the clock


def test_the_halves_of_a_gan_are_both_seen():
    # G is met in step 2, which is not sampled, and so sampled at its next; then it is D's turn behind each of G's.
    assert sampled(plan_of(), of_turns(("D", 1), ("G", 1))) == [1, 3, 4, 10, 11, 20, 21, 30, 31, 40]


def test_two_critic_steps_for_each_of_the_actor():
    steps = of_turns(("D", 2), ("G", 1))
    # Steps 3, 6, 9, ... are G's. Behind the 20th, a D, comes a G; behind the 30th, a G, a D.
    assert sampled(plan_of(), steps) == [1, 4, 5, 6, 10, 11, 12, 20, 21, 30, 31, 40]


def test_blocks_of_three():
    steps = of_turns(("D", 3), ("G", 3))
    found = sampled(plan_of(), steps)
    assert found == [1, 5, 10, 11, 12, 13, 20, 21, 22, 30, 31, 40]
    for first in (10, 20, 30):
        seen = {steps[step - 1] for step in found if first <= step < first + 10}
        assert seen == {"D", "G"}


def test_one_that_joins_late_is_sampled_at_its_next_step():
    steps = ["A"] * 13 + ["B", "A", "A", "B"] + ["A"] * 2
    assert sampled(plan_of(), steps) == [1, 10, 15, 16, 17]
    assert sampled(plan_of(), ["A"] * 13 + ["AB"] * 6) == [1, 10, 15]


def test_no_more_than_eight_further_steps_are_waited_for():
    steps = ["A"] * 12 + ["B"] + ["A"] * 90
    assert sampled(plan_of(every=100), steps) == [1, *range(14, 22), 100]
    assert sampled(plan_of(every=100), of_turns(("A", 20), ("B", 20), steps=130)) == [1, 22, 100, 101]


def test_a_schedule_of_the_users_is_taken_as_it_is():
    steps = of_turns(("D", 1), ("G", 1))
    assert sampled(plan_of(every=lambda step: step in (4, 20)), steps) == [4, 20]
    assert sampled(plan_of(every=torchprobe.window(3, 4)), steps) == [3, 4]
    assert sampled(plan_of(every=torchprobe.every(10)), steps)[:4] == [1, 3, 4, 10]


def test_every_probe_follows_its_own_cadence():
    plan = Plan([torchprobe.Gradients(every=10), torchprobe.Parameters(every=7)], None, None, Meter())
    found = {"Gradients": [], "Parameters": []}
    optimizers = Optimizers()
    for step, letter in enumerate(of_turns(("D", 1), ("G", 1), steps=22), 1):
        plan.open_for(step)
        for reporter in plan.due:
            found[reporter.name].append(step)
        plan.optimizer_stepped(optimizers[letter])
    assert found == {"Gradients": [1, 3, 4, 10, 11, 20, 21], "Parameters": [1, 3, 4, 7, 8, 14, 15, 21, 22]}


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped():
    steps = of_turns(("D", 1), ("G", 1))
    for stop in (5, 10, 20, 24):
        first, second, optimizers = plan_of(), plan_of(), Optimizers()
        before = sampled(first, steps[:stop], optimizers)
        second.load_state_dict(first.state_dict())
        assert before + sampled(second, steps[stop:], first=stop + 1) == sampled(plan_of(), steps), stop


def test_optimizers_are_not_kept_alive():
    plan, optimizers = plan_of(), Optimizers()
    sampled(plan, of_turns(("D", 1), ("G", 1)), optimizers)
    gone = torch.utils.weak.ref(optimizers["G"])
    del optimizers["G"]
    gc.collect()
    assert gone() is None


def test_a_schedule_that_raises_ends_its_probe_alone_and_is_said_once(caplog):
    def schedule(step):
        if step == 4:
            raise ValueError("no such phase")
        return True

    plan = Plan([torchprobe.Activations(every=schedule).parts()[0], torchprobe.Gradients(every=1)], None, None, Meter())
    for step in range(1, 8):
        plan.open_for(step)
        assert {reporter.name for reporter in plan.due} == ({"Activations", "Gradients"} if step < 4 else {"Gradients"})
    assert [record.getMessage() for record in caplog.records if "Activations" in record.getMessage()] == [
        "the schedule of Activations raised, which is switched off; training goes on"
    ]


def test_one_cadence_for_all_is_for_those_that_cost_something():
    plan = Plan([torchprobe.Gradients(), torchprobe.Parameters(every=3), torchprobe.LearningRates()], 2, None, Meter())
    opened = {reporter.name: [] for reporter in plan.reporters}
    for step in range(1, 7):
        plan.open_for(step)
        for reporter in plan.reporters:
            if reporter.gate.train:
                opened[reporter.name].append(step)
    assert opened == {"Gradients": [1, 2, 4, 6], "Parameters": [1, 3, 6], "LearningRates": [1, 2, 3, 4, 5, 6]}


def test_an_idle_step_asks_nothing(monkeypatch):
    parts = [part for probe in default_probes() for part in probe.parts()]
    plan, optimizers = Plan(parts, None, None, Meter()), Optimizers()
    sampled(plan, ["A"] * 102, optimizers)
    monkeypatch.setattr(plan, "_open", pytest.fail)
    sampled(plan, ["A"] * 96, optimizers, first=103)
    seconds = min(timeit.repeat(lambda: [plan.open_for(step) for step in range(110, 190)], number=50, repeat=5)) / 4000
    assert seconds < 100e-6  # 0.5 microseconds; far above what a loaded machine makes of them
