"""Times of a step, by a clock that only the test moves: 5 for data, 2 forward, 3 backward, 4 for the optimizer."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchprobe
from tests.models import Transformer
from tests.setups.compiled import COMPILERS_WARNINGS
from torchprobe.capture import gate, times
from torchprobe.testing import MemoryWriter

TIMED = [1, 2, 4, 5, 9, 10, 19, 20]  # of 20 steps by default: those that all probes sample, and the ones before
KNOWN = TIMED[1:]  # when the step before has ended, which of the first nobody knows
ALONE = [4, 9, 19]  # no other probe is due
PLAIN = {"step": 14.0, "input_wait": 5.0, "forward": 2.0, "backward": 3.0, "optimizer": 4.0}


class Clock:
    """Seconds that pass where a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(gate, "perf_counter", made)
    return made


class Slow(torch.autograd.Function):
    """Takes 3 seconds backward."""

    @staticmethod
    def forward(ctx, x, clock):
        ctx.clock = clock
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.clock.spend(3.0)
        return gradient, None


class Net(nn.Module):
    """Takes 2 seconds forward."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.first, self.last, self.clock = nn.Linear(4, 4), nn.Linear(4, 1), clock

    def forward(self, x):
        self.clock.spend(2.0)
        return self.last(Slow.apply(self.first(x), self.clock))


def optimizer_of(parameters, clock) -> torch.optim.Optimizer:
    """Takes 4 seconds a step."""
    made = torch.optim.SGD(parameters, lr=1e-3)
    made.register_step_pre_hook(lambda *_: clock.spend(4.0))
    return made


class Derived(torch.optim.SGD):
    """Takes 4 seconds before its parent's step."""

    clock: Clock

    def step(self, closure=None):
        self.clock.spend(4.0)
        return super().step(closure)


class Run:
    """A model, its optimizer, and what is recorded of them."""

    def __init__(self, clock: Clock, **options) -> None:
        self.clock, self.model, self.writer = clock, Net(clock), MemoryWriter()
        self.optimizer = optimizer_of(self.model.parameters(), clock)
        self.session = torchprobe.instrument(self.model, writer=self.writer, **options)

    def data(self, rows: int = 8) -> torch.Tensor:
        self.clock.spend(5.0)
        return torch.randn(rows, 4)

    def train(self, x: torch.Tensor) -> None:
        self.model(x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps(self, number: int) -> None:
        for _ in range(number):
            self.train(self.data())

    def seconds(self, name: str) -> dict[int, float]:
        return dict(self.writer.scalars(f"performance/{name}_seconds"))

    def rates(self, name: str) -> dict[int, float]:
        return dict(self.writer.scalars(f"performance/{name}_per_second"))


@pytest.fixture
def run(clock):
    made = Run(clock)
    yield made
    made.session.detach()


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


# ---- what is not known is not written


def dropped(run):
    run.model(run.data())


def raises(run):
    with pytest.raises(RuntimeError):
        run.model(torch.randn(8, 5))


def unused(run):
    run.model(run.data()).sum().backward()
    run.optimizer.zero_grad()


@pytest.mark.parametrize("extra", [dropped, raises, unused])
def test_a_step_with_a_pass_that_nobody_used(run, extra):
    for _ in range(5):
        extra(run)
        run.steps(1)
    run.session.detach()
    assert not run.seconds("forward")
    assert not run.seconds("backward")
    assert not run.rates("examples")
    assert run.seconds("optimizer") == dict.fromkeys([1, 2, 4, 5], 4.0)


def test_training_in_evaluation_mode(run):
    run.model.eval()
    run.steps(5)
    run.session.detach()
    assert not run.seconds("forward")
    assert not run.seconds("input_wait")
    assert run.seconds("step") == dict.fromkeys(range(2, 6), 14.0)


def test_a_closure_runs_inside_of_the_step(run):
    def closure():
        run.optimizer.zero_grad()
        loss = run.model(torch.randn(8, 4)).square().mean()
        loss.backward()
        return loss

    for _ in range(5):
        run.clock.spend(5.0)
        run.optimizer.step(closure)
    run.session.detach()
    assert not run.seconds("optimizer")
    assert run.seconds("step") == dict.fromkeys(range(2, 6), 14.0)


def test_an_optimizer_that_calls_its_parents_step(run):
    run.optimizer = Derived(run.model.parameters(), lr=1e-3)
    run.optimizer.clock = run.clock
    run.steps(5)
    run.session.detach()
    assert run.seconds("optimizer") in ({}, dict.fromkeys([1, 2, 4, 5], 4.0))  # torch calls its hooks for both
    assert run.seconds("step") == dict.fromkeys(range(2, 6), 14.0)


def test_a_graph_that_is_run_backward_twice(run):
    for _ in range(5):
        loss = run.model(run.data()).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    run.session.detach()
    assert not run.seconds("forward")
    assert not run.seconds("backward")


def test_without_the_probe_nothing_is_written(clock):
    run = Run(clock, probes=[torchprobe.Loss()])
    run.steps(5)
    run.session.detach()
    assert not [tag for tag in run.writer.tags() if tag.startswith("performance/")]


def test_a_probe_that_fails_ends_alone(run, monkeypatch, caplog):
    run.steps(3)
    monkeypatch.setattr(times.Timing, "begin", lambda self, name: 1 / 0)  # of step 4, the next that is timed
    run.steps(9)
    run.session.detach()
    assert caplog.text.count("probe Performance failed") == 1
    assert run.seconds("step") == {2: 14.0, 3: 14.0}
    assert run.seconds("forward") == {1: 2.0, 2: 2.0}
    assert [step for step, _ in run.writer.scalars("overview/loss")] == list(range(1, 13))


@pytest.mark.parametrize("first", [pytest.param(one, marks=COMPILERS_WARNINGS) for one in ("compile", "instrument")])
def test_a_compiled_model_is_as_any_other_or_says_nothing(clock, first):
    model, writer = nn.Linear(4, 1), MemoryWriter()
    optimizer = optimizer_of(model.parameters(), clock)
    callee = torch.compile(model, backend="eager") if first == "compile" else model
    session = torchprobe.instrument(callee, writer=writer)
    callee = torch.compile(model, backend="eager") if first == "instrument" else callee
    for _ in range(10):
        clock.spend(5.0)
        callee(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    session.detach()
    assert {value for _, value in writer.scalars("performance/step_seconds")} == {9.0}
    assert [step for step, _ in writer.scalars("performance/step_seconds")] == list(range(2, 11))
    assert {value for _, value in writer.scalars("performance/input_wait_seconds")} <= {5.0}
    assert {value for _, value in writer.scalars("performance/forward_seconds")} <= {0.0}
    assert [value for _, value in writer.scalars("performance/optimizer_seconds")] == [4.0] * 6
    assert [step for step, _ in writer.scalars("performance/optimizer_seconds")] == [1, 2, 4, 5, 9, 10]
    assert {round(9 * value) for _, value in writer.scalars("performance/examples_per_second")} <= {8}


# ---- what passes through the model


class Reads(nn.Module):
    """Any inputs; one row of output for each row of the first."""

    def __init__(self, part: nn.Module | None = None) -> None:
        super().__init__()
        self.weight, self.part = nn.Parameter(torch.ones(1)), part

    def forward(self, x, *others, **more):
        first = x["ids"] if isinstance(x, dict) else x
        return first.reshape(len(first), -1).float().mean(1) * self.weight


def sizes(clock, *inputs, model=None, passes=1, **named) -> tuple[float | None, float | None]:
    """Examples and tokens of a step, in which a second passes."""
    writer, model = MemoryWriter(), model or Reads()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with torchprobe.instrument(model, writer=writer, probes=[torchprobe.Performance(every=2)]):
        for _ in range(2):
            clock.spend(1.0)
            sum(model(*inputs, **named).sum() for _ in range(passes)).backward()
            optimizer.step()
            optimizer.zero_grad()
    rates = [dict(writer.scalars(f"performance/{what}_per_second")) for what in ("examples", "tokens")]
    return rates[0].get(2), rates[1].get(2)


IDS = torch.zeros(3, 7, dtype=torch.long)


@pytest.mark.parametrize(
    ("inputs", "known"),
    [
        ((torch.ones(3, 7),), (3.0, None)),
        ((torch.ones(3, 2, 8, 8),), (3.0, None)),
        ((IDS,), (3.0, 21.0)),
        ((IDS, torch.ones_like(IDS)), (3.0, 21.0)),  # and an attention mask
        (({"ids": IDS, "mask": IDS > 0},), (3.0, 21.0)),
        ((torch.ones(3, 7), torch.zeros(3, dtype=torch.long)), (3.0, None)),  # and labels, or times
        ((torch.ones(3, 7), IDS), (3.0, None)),  # and a map of labels
        ((torch.zeros(3, 28, 28, dtype=torch.uint8),), (3.0, None)),  # bytes of images
        ((torch.ones(3, 7), torch.zeros(2, 9, dtype=torch.long)), (None, None)),  # nodes of a graph, and edges
        ((IDS, torch.zeros(7, 7)), (None, None)),  # and a causal mask
        ((torch.ones(7),), (None, None)),  # one example, or seven
    ],
)
def test_examples_and_tokens_by_what_a_model_is_called_with(clock, inputs, known):
    assert sizes(clock, *inputs) == known


def test_a_model_that_takes_time_first_has_no_examples(clock):
    assert sizes(clock, torch.ones(3, 7), model=Reads(nn.LSTM(7, 2))) == (None, None)
    assert sizes(clock, torch.ones(3, 7), model=Reads(nn.LSTM(7, 2, batch_first=True))) == (3.0, None)


def test_one_input_that_is_passed_several_times_counts_once(clock):
    assert sizes(clock, torch.ones(3, 7), passes=5) == (3.0, None)


def test_tokens_of_a_language_model():
    model, writer = Transformer(), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with torchprobe.instrument(model, writer=writer):
        for _ in range(4):
            ids = torch.randint(0, 11, (3, 7))
            F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    seconds = writer.value("performance/step_seconds", step=4)
    assert writer.value("performance/tokens_per_second", step=4) == pytest.approx(21 / seconds)
    assert writer.value("performance/examples_per_second", step=4) == pytest.approx(3 / seconds)


# ---- several ranks, and devices that lag behind


def row(**known) -> torch.Tensor:
    fields = torchprobe.Performance.fields
    values = {"ranks": 2.0, "parts": 1.0, "wall": 0.0, **known}
    return torch.tensor([values.get(name, math.nan) for name in fields], dtype=torch.float64)


def reported(*rows) -> dict[str, float]:
    found = torchprobe.Performance().report_all(["step"] * len(rows), torch.stack(rows).numpy())
    return {tag.removeprefix("performance/"): value for tag, value in found}


def test_ranks_have_the_largest_times_and_the_sum_of_rates():
    probe = torchprobe.Performance()
    a = row(step_seconds=1.0, forward_seconds=0.25, peak_memory_bytes=10.0, examples_per_second=8.0)
    b = row(step_seconds=2.0, peak_memory_bytes=9.0, examples_per_second=4.0, tokens_per_second=1.0)
    assert reported(probe.combine(a, b)) == {
        "step_seconds": 2.0,
        "peak_memory_bytes": 10.0,
        "examples_per_second": 12.0,
    }


def test_rates_of_some_ranks_alone_are_not_written():
    assert reported(row(step_seconds=1.0, examples_per_second=8.0)) == {"step_seconds": 1.0}


def test_ranks_that_see_the_same_examples_have_one_rate():
    a, b = row(step_seconds=1.0, tokens_per_second=8.0), row(step_seconds=2.0, tokens_per_second=4.0)
    assert reported(a, b) == {"step_seconds": 2.0, "tokens_per_second": 4.0}


class Lagging:
    """A device whose clock is the test's, and which has come no further than so many seconds before it."""

    device = torch.device("cuda", 0)

    def __init__(self, clock: Clock, lag: float) -> None:
        self.clock, self.lag = clock, lag

    def now(self) -> float:
        return self.clock.now

    def passed(self, mark: float) -> bool:
        return mark <= self.clock.now - self.lag

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def peak_memory(self) -> float:
        return 123.0


@pytest.fixture
def lagging(clock, monkeypatch):
    """A run on a device that lags behind by so many seconds."""

    def start(lag: float, **options) -> Run:
        monkeypatch.setattr(times, "_watch_of", lambda model, meter: Lagging(clock, lag))
        return Run(clock, **options)

    return start


@pytest.mark.parametrize("lag", [0.0, 14.0, 5 * 14.0])
def test_records_wait_in_order_until_the_device_has_come_to_the_end_of_a_timed_step(lagging, lag):
    run = lagging(lag)
    run.steps(8)
    assert run.session.step == 8
    run.steps(12)
    run.session.detach()
    steps = [step for step, _ in run.writer.scalars("overview/loss")]
    assert steps == list(range(1, 21))
    assert run.seconds("step") == dict.fromkeys(range(2, 21), PLAIN["step"])
    last = 20 - lag // 14  # the run ends before later ones can be read
    for name in ("forward", "backward", "optimizer"):
        assert run.seconds(name) == {step: PLAIN[name] for step in ALONE if step <= last}, name
    after_quiet = [4, 5, 9, 10, 19, 20]  # in step 1 other probes have given the device work
    assert run.seconds("input_wait") == {step: PLAIN["input_wait"] for step in after_quiet if step <= last}
    assert run.rates("examples") == dict.fromkeys(KNOWN, pytest.approx(8 / 14))
    assert {value for _, value in run.writer.scalars("performance/peak_memory_bytes")} == {123.0}


def test_a_device_that_never_comes_costs_its_times_alone(lagging):
    run = lagging(math.inf)
    run.steps(40)
    held = [record.step for record in run.writer.records]
    run.session.detach()
    assert max(held, default=0) <= 40
    assert [step for step, _ in run.writer.scalars("overview/loss")] == list(range(1, 41))
    assert not run.seconds("forward")
    assert run.seconds("step") == dict.fromkeys(range(2, 41), PLAIN["step"])


def test_a_device_has_done_our_work_where_the_step_before_was_sampled(lagging):
    run = lagging(0.0, probes=[torchprobe.Performance(every=3), torchprobe.Activations(every=2)])
    run.steps(14)
    run.session.detach()
    assert run.seconds("input_wait") == dict.fromkeys([6, 12], 5.0)
    assert run.seconds("forward") == dict.fromkeys([3, 9], 2.0)


def test_flushing_does_not_wait_for_a_device(lagging):
    run = lagging(30.0)
    run.steps(4)
    run.model(run.data())  # step 5 begins
    assert run.session.flush(10.0)
    assert run.writer.value("performance/step_seconds", step=4) == 14.0
    assert not run.seconds("forward")
    run.session.detach()
