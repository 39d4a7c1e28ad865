"""Times of a step, by the clock of `timed`: 5 for data, 2 forward, 3 backward, 4 for the optimizer."""

from __future__ import annotations

import pytest
import torch

import torchprobe
from tests.probes.timed import KNOWN, PLAIN, TIMED, Clock, Run, optimizer_of


def test_the_times_of_a_plain_loop(run):
    run.steps(20)
    run.session.detach()
    assert run.seconds("step") == dict.fromkeys(range(2, 21), PLAIN["step"])
    for name in ("forward", "backward", "optimizer"):
        assert run.seconds(name) == dict.fromkeys(TIMED, PLAIN[name]), name
    assert run.seconds("input_wait") == dict.fromkeys(KNOWN, PLAIN["input_wait"])
    assert run.rates("examples") == dict.fromkeys(KNOWN, pytest.approx(8 / 14))
    assert not run.rates("tokens")
    assert all(2**20 < value < 2**45 for _, value in run.writer.scalars("performance/peak_memory_bytes"))
    assert [step for step, _ in run.writer.scalars("performance/peak_memory_bytes")] == TIMED


@pytest.mark.parametrize(
    ("every", "timed"),
    [
        (1, [*range(1, 13)]),
        (2, [*range(1, 13)]),
        (3, [1, 2, 3, 5, 6, 8, 9, 11, 12]),
        (5, [1, 4, 5, 9, 10]),
        (lambda step: step in (3, 8), [3, 8]),  # a schedule of the user's is taken as it is
    ],
)
def test_a_common_cadence_leads_the_times_of_a_step_too(clock, every, timed):
    run = Run(clock, every=every)
    run.steps(12)
    run.session.detach()
    assert run.seconds("step") == dict.fromkeys(range(2, 13), PLAIN["step"])
    for name in ("forward", "backward", "optimizer"):
        assert run.seconds(name) == dict.fromkeys(timed, PLAIN[name]), name
    assert run.seconds("input_wait") == dict.fromkeys(set(timed) - {1}, PLAIN["input_wait"])


def test_a_cadence_that_is_changed_while_a_run_goes_on_leads_them_too(run):
    run.steps(10)
    run.session.every(4)
    run.steps(10)
    run.session.detach()
    assert run.seconds("forward") == dict.fromkeys([1, 2, 4, 5, 9, 10, 11, 12, 15, 16, 19, 20], PLAIN["forward"])


class Costly(torchprobe.Probe):
    """Takes 100 seconds for each module or parameter."""

    source = ("outputs", "output_gradients", "micro_gradients", "gradients", "parameters", "updates")
    fields, reduce = ("nothing",), "sum"
    clock: Clock

    def compute(self, tensor):
        type(self).clock.spend(100.0)
        return tensor.new_zeros(1)

    def report(self, name, values):
        return ()


def test_what_torchprobe_takes_is_left_out_in_the_steps_in_which_it_takes_something_too(clock):
    Costly.clock = clock
    run = Run(clock, probes=[torchprobe.Performance(), Costly(every=9)])
    began = clock.now
    run.steps(20)
    run.session.detach()
    assert clock.now - began > 20 * PLAIN["step"] + 3 * 6 * 2 * 100  # steps 1, 9 and 18: six sources, two modules
    assert run.seconds("step") == dict.fromkeys(range(2, 21), PLAIN["step"])
    assert run.seconds("input_wait") == dict.fromkeys(KNOWN, PLAIN["input_wait"])  # 2, 10 and 19 follow one of them
    for name in ("forward", "backward", "optimizer"):
        assert run.seconds(name) == dict.fromkeys(TIMED, PLAIN[name]), name


def test_micro_batches_add_up(run):
    for _ in range(5):
        for _ in range(3):
            run.model(run.data()).square().mean().backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    run.session.detach()
    assert run.seconds("step") == dict.fromkeys(range(2, 6), 3 * 10.0 + 4.0)
    assert run.seconds("input_wait") == dict.fromkeys([2, 4, 5], 5.0)
    assert run.seconds("forward") == dict.fromkeys([1, 2, 4, 5], 6.0)
    assert run.seconds("backward") == dict.fromkeys([1, 2, 4, 5], 9.0)
    assert run.rates("examples") == dict.fromkeys([2, 4, 5], pytest.approx(24 / 34))


def test_optimizers_that_share_a_step_add_up(clock):
    run = Run(clock)
    halves = [optimizer_of(part.parameters(), clock) for part in (run.model.first, run.model.last)]
    for _ in range(5):
        run.model(run.data()).square().mean().backward()
        for optimizer in halves:
            optimizer.step()
            optimizer.zero_grad()
    run.session.detach()
    assert run.seconds("step") == dict.fromkeys(range(2, 6), 18.0)
    assert run.seconds("optimizer") == dict.fromkeys([1, 2, 4, 5], 8.0)
    assert run.seconds("input_wait") == dict.fromkeys([2, 4, 5], 5.0)


def test_no_wait_is_written_where_validation_ran(run):
    run.steps(3)
    with torch.no_grad():
        run.model(torch.randn(8, 4))
    run.steps(2)
    run.session.detach()
    assert run.seconds("input_wait") == {2: 5.0, 5: 5.0}
    assert run.rates("examples") == {2: pytest.approx(8 / 14), 5: pytest.approx(8 / 14)}
    assert run.seconds("forward") == dict.fromkeys([1, 2, 4, 5], 2.0)
    assert run.seconds("step") == {2: 14.0, 3: 14.0, 4: 16.0, 5: 14.0}


def test_what_is_set_aside_does_not_count(run):
    run.steps(3)
    with run.session.paused(), run.session.paused():
        run.clock.spend(1000.0)
        run.model(torch.randn(8, 4))
    run.steps(2)
    run.session.detach()
    assert run.seconds("step") == dict.fromkeys(range(2, 6), 14.0)
    assert run.seconds("input_wait") == dict.fromkeys([2, 4, 5], 5.0)
    assert run.seconds("forward") == dict.fromkeys([1, 2, 4, 5], 2.0)


def test_a_resumed_run_does_not_count_the_time_between(run, clock):
    run.steps(8)
    state = run.session.state_dict()
    run.session.detach()
    clock.spend(1e6)
    other = Run(clock)
    other.session.load_state_dict(state)
    other.steps(3)
    other.session.detach()
    assert other.seconds("step") == {10: 14.0, 11: 14.0}
    assert other.seconds("input_wait") == {10: 5.0}
    assert other.seconds("forward") == {9: 2.0, 10: 2.0}


def test_flushing_in_the_middle_of_a_step_splits_nothing(run):
    for _ in range(5):
        for _ in range(2):
            run.model(run.data()).square().mean().backward()
            run.session.flush()
        run.optimizer.step()
        run.session.flush()
        run.optimizer.zero_grad()
    run.session.detach()
    assert run.seconds("step") == dict.fromkeys(range(2, 6), 24.0)
    assert run.seconds("forward") == dict.fromkeys([1, 2, 4, 5], 4.0)
    assert run.seconds("backward") == dict.fromkeys([1, 2, 4, 5], 6.0)


def test_steps_that_the_user_ends(run):
    for _ in range(6):
        run.train(run.data())
        run.clock.spend(10.0)
        run.session.next_step()
    run.session.detach()
    assert run.seconds("step") == dict.fromkeys(range(2, 7), 24.0)
    assert run.seconds("input_wait") == dict.fromkeys([2, 4, 5], 5.0)
    assert run.seconds("optimizer") == dict.fromkeys([1, 2, 4, 5], 4.0)


def test_forward_passes_as_steps(clock):
    run = Run(clock)
    del run.optimizer
    for _ in range(6):
        with torch.no_grad():
            run.model(run.data())
    run.session.detach()
    assert set(run.seconds("step").values()) == {7.0}
    assert not run.seconds("backward")
    assert not run.seconds("optimizer")


def test_two_models_have_times_of_their_own(clock):
    one, other = Run(clock), Run(clock)
    for _ in range(5):
        one.steps(1)
        other.steps(1)
    for run in (one, other):
        run.session.detach()
        assert set(run.seconds("step").values()) == {28.0}
        assert run.seconds("forward") == dict.fromkeys([1, 2, 4, 5], 2.0)
        assert not run.seconds("input_wait")  # the other one's step


class Slowly(torch.utils.data.Dataset):
    """Takes some seconds for each example."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def __len__(self) -> int:
        return 8 * 60

    def __getitem__(self, index):
        self.clock.spend(self.seconds)
        return torch.randn(4)


@pytest.mark.parametrize(("seconds", "rules"), [(1.0, ["input_bound"]), (0.25, [])])
def test_a_loader_that_is_too_slow_for_its_model_is_named(run, seconds, rules):
    for x in torch.utils.data.DataLoader(Slowly(run.clock, seconds), batch_size=8):
        run.train(x)
    run.session.detach()
    assert [alert.rule for alert in run.session.alerts] == rules
    for alert in run.session.alerts:
        assert alert.value == pytest.approx(8 / 17)
        assert "data loader" in alert.advice
