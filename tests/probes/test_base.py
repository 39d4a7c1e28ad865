"""What a probe of one's own may be: frozen, with a way to merge parts, of one source or several."""

from __future__ import annotations

import copy
import functools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchprobe
from torchprobe.distributed.mailbox import Part
from torchprobe.distributed.merge import merge
from torchprobe.probes.checks import REDUCTIONS
from torchprobe.probes.choosing import checked_probes, default_probes
from torchprobe.testing import MemoryWriter


class Mine(torchprobe.Probe):
    """The mean, largest or last value of outputs."""

    source, fields = "outputs", ("mean",)

    def compute(self, tensor):
        return tensor.mean().reshape(1)

    def report(self, name, values):
        yield f"mine/{name}", values["mean"]


class Largest(Mine):
    reduce = "max"

    def compute(self, tensor):
        return tensor.max().reshape(1)


class Total(Mine):
    reduce = "sum"

    def compute(self, tensor):
        return tensor.sum().reshape(1)


EXPECTED = {  # of all rows together, by what a probe keeps
    "sum": (Total(every=1), lambda parts: torch.cat(parts).sum()),
    "mean": (Mine(every=1, reduce="mean"), lambda parts: torch.cat(parts).mean()),
    "max": (Largest(every=1), lambda parts: torch.cat(parts).max()),
    "last": (Mine(every=1, reduce="last"), lambda parts: parts[-1].mean()),
}


@pytest.fixture(params=list(EXPECTED))
def reduction(request):
    return EXPECTED[request.param]


def test_a_probe_cannot_be_changed_once_it_is_made():
    probe = torchprobe.Calibration(every=10)
    for change in (lambda: setattr(probe, "every", 5), lambda: setattr(probe, "window", 1)):
        with pytest.raises(
            AttributeError, match=r"^Calibration\.\w+ cannot be set: a probe is configuration.*Reporter"
        ):
            change()
    assert probe.every == 10


def test_a_copy_is_frozen_too():
    for made in (copy.deepcopy(torchprobe.Uncertainty(sample_dim=0)), pickle.loads(pickle.dumps(torchprobe.Loss(3)))):
        with pytest.raises(AttributeError, match="cannot be set"):
            made.sample_dim = 1


def test_a_subclass_may_set_what_it_likes_while_it_is_made():
    class Wide(Mine):
        def __init__(self, width):
            super().__init__(reduce="sum")
            self.unit = 3 * width

    assert Wide(2).unit == 6


def test_every_session_has_reporters_of_its_own():
    for probe in default_probes():
        for part in probe.parts():
            assert part.reporter() is not part.reporter()
            assert part.reporter().probe is part


@pytest.mark.parametrize("sizes", [(3, 5), (1, 6, 2), (4, 4, 1, 7)])
def test_micro_batches_of_unequal_size_are_as_one_batch(reduction, sizes):
    probe, expected = reduction
    model, writer, x = nn.Sequential(nn.Linear(3, 2)), MemoryWriter(), torch.randn(sum(sizes), 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torchprobe.instrument(model, writer=writer, probes=[probe], rules=[]):
        for _ in range(2):
            for part in x.split(sizes):
                model(part).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    outputs = [model(part).detach().double() for part in x.split(sizes)]
    assert writer.value("mine/0", 2) == pytest.approx(expected(outputs).item(), rel=1e-6)


@pytest.mark.parametrize("sizes", [(3, 5), (0, 6, 2), (4, 4, 1, 7)])
def test_ranks_with_batches_of_unequal_size_are_as_one(reduction, sizes):
    probe, expected = reduction
    parts = list(torch.randn(sum(sizes), 2, dtype=torch.float64).split(list(sizes)))
    found = {
        rank: Part("0", "", ["0"], probe.measure(part)[None].numpy()) for rank, part in enumerate(parts) if len(part)
    }
    merged = merge(probe.reporter(), {rank: [part] for rank, part in found.items()}, [[rank] for rank in found])
    ((tag, value),) = probe.reporter().report_all(merged.names, merged.rows)
    assert tag == "mine/0"
    assert value == pytest.approx(expected(parts).item())


def test_a_part_without_elements_does_not_touch_the_mean():
    probe = Mine(reduce="mean")
    empty, full = (probe.measure(torch.randn(size, dtype=torch.float64)) for size in (0, 4))
    for a, b in ((empty, full), (full, empty)):
        torch.testing.assert_close(probe.combine(a, b), full)
    assert probe.combine(empty, empty)[0].isnan()


NUMBERS = st.floats(-1e6, 1e6) | st.sampled_from((0.0, 1e-310, math.nan, math.inf))


def mean_of(part):
    return math.fsum(part) / len(part) if part else math.nan


def largest_of(part):
    return math.nan if any(map(math.isnan, part)) else max(part, default=-math.inf)


@pytest.mark.parametrize(("reduce", "value_of"), [("sum", math.fsum), ("mean", mean_of), ("max", largest_of)])
@given(parts=st.lists(st.lists(NUMBERS, max_size=5), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_unequal_parts_merge_to_the_whole(reduce, value_of, parts):
    def row(part):
        return torch.tensor([value_of(part), len(part)][: 1 + (reduce == "mean")], dtype=torch.float64)

    merged = functools.reduce(REDUCTIONS[reduce], map(row, parts))
    whole = [number for part in parts for number in part]
    assert merged.tolist() == pytest.approx(row(whole).tolist(), rel=1e-12, abs=1e-8, nan_ok=True)


def test_many_rows_are_merged_as_one_by_one():
    for probe, _ in EXPECTED.values():
        a, b = np.random.default_rng(0).random((2, 5, probe.width))
        one_by_one = [
            probe.combine(torch.from_numpy(x), torch.from_numpy(y)).numpy() for x, y in zip(a, b, strict=True)
        ]
        np.testing.assert_allclose(probe.combine_rows(a, b), one_by_one)


def test_a_probe_that_does_not_say_how_parts_are_merged_is_refused():
    with pytest.raises(TypeError, match=r"^Mine does not say.*combine\(self, a, b\), or reduce = 'sum', 'mean'"):
        torchprobe.instrument(nn.Linear(2, 2), writer=MemoryWriter(), probes=[Mine()])
    checked_probes([Mine(reduce="last"), Total(), *default_probes()])


def test_reduce_is_checked_and_not_for_probes_with_a_rule_of_their_own():
    with pytest.raises(ValueError, match="reduce='median': takes one of 'sum', 'mean', 'max', 'last'"):
        Mine(reduce="median")
    with pytest.raises(ValueError, match=r"Odd\.reduce is 'median'"):
        type("Odd", (Mine,), {"reduce": "median"})()
    for probe in (torchprobe.Gradients, torchprobe.Parameters):
        with pytest.raises(TypeError, match=f"{probe.__name__} merges its parts by a rule of its own"):
            probe(reduce="max")
    assert Total(reduce="last").reduce == "last"


def test_sources_that_are_wired_to_our_own_probes_are_refused():
    for source in ("attention", "loss", "units", "optimizers", ("outputs", "flow"), ()):
        with pytest.raises(TypeError, match=r"takes one of 'outputs', 'output_gradients', 'gradients', 'parameters'"):
            type("Odd", (Mine,), {"source": source})()
    assert type("MyLoss", (torchprobe.Loss,), {})().source == "loss"


class Moved(Total):
    source = "updates"


def test_updates_are_what_the_step_has_added():
    model, writer = nn.Linear(3, 2), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with torchprobe.instrument(model, writer=writer, probes=[Moved(every=1)]):
        model(torch.ones(4, 3)).sum().backward()  # every gradient is 4
        optimizer.step()
    assert writer.value("mine/weight") == pytest.approx(-0.5 * 4 * 6)
    assert writer.value("mine/bias") == pytest.approx(-0.5 * 4 * 2)


class Both(torchprobe.Probe):
    """The norms of outputs and of the loss's gradient with respect to them, and their ratio."""

    source, fields, reduce, default_every = ("outputs", "output_gradients", "parameters"), ("squares",), "sum", 1

    def compute(self, tensor):
        return tensor.double().square().sum().reshape(1)

    def report(self, name, values):
        for source, fields in values.items():
            yield f"both_{source}/{name}", fields["squares"]
        if "output_gradients" in values:
            yield f"ratio/{name}", values["output_gradients"]["squares"] / values["outputs"]["squares"]


def test_a_probe_of_several_sources_reports_on_all_of_them_together():
    model, writer, x = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), MemoryWriter(), torch.randn(5, 3)
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torchprobe.instrument(model, writer=writer, probes=[Both()], rules=[]):
        for part in x.split((2, 3)):
            model(part).sum().backward()
        optimizer.step()
        with torch.no_grad():
            model.eval()(x)
    outputs = model[0](x).detach().double().square().sum().item()
    gradients = 5 * model[1].weight.detach().double().square().sum().item()
    assert writer.value("both_outputs/0", 1) == pytest.approx(outputs)
    assert writer.value("ratio/0", 1) == pytest.approx(gradients / outputs)
    assert writer.value("both_parameters/1.weight", 1) == pytest.approx(gradients / 5)
    assert writer.value("val/both_outputs/0") == pytest.approx(outputs)
    tags = {tag for tag in writer.tags() if not tag.startswith(("overview", "val"))}
    assert {tag for tag in tags if "parameters" not in tag} == {
        f"{kind}/{name}" for kind in ("both_outputs", "both_output_gradients", "ratio") for name in ("0", "1")
    }


def test_a_source_that_has_nothing_is_said_though_others_have(caplog):
    model = nn.Linear(3, 2).requires_grad_(False)
    other = nn.Linear(2, 1)
    optimizer = torch.optim.SGD([*other.parameters()], lr=0.0)
    whole = nn.Sequential(model, other)
    probe = type("Here", (Both,), {"source": ("outputs", "output_gradients")})(select="0")
    with torchprobe.instrument(whole, writer=MemoryWriter(), probes=[probe], rules=[]):
        for _ in range(4):
            whole(torch.randn(5, 3)).sum().backward()
            optimizer.step()
    said = [record.getMessage() for record in caplog.records if "nothing captured" in record.getMessage()]
    assert len(said) == 1
    assert "Here" in said[0]
    assert "gradient" in said[0]


@pytest.fixture(params=["outputs", "output_gradients", "gradients", "parameters", "micro_gradients"])
def beside_one_of(request):
    """Trains with a probe of this source beside one of gradients: the writer."""

    def run(compute, combine=None, accumulated=2):
        body = {"source": request.param, "reduce": "last", "compute": lambda self, tensor: compute(tensor)}
        odd = type("Odd", (Mine,), body if combine is None else body | {"combine": lambda self, a, b: combine(a, b)})
        model, writer = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), MemoryWriter()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        probes = [odd(every=1), torchprobe.Gradients(every=1), torchprobe.Activations(every=1)]
        with torchprobe.instrument(model, writer=writer, probes=probes, rules=[]):
            for _ in range(3):
                for _ in range(accumulated):
                    model(torch.randn(4, 3)).sum().backward()
                optimizer.step()
        return writer

    return run


def check_others(writer):
    assert [step for step, _ in writer.scalars("overview/grad_norm")] == [1, 2, 3]
    assert [step for step, _ in writer.scalars("activation_mean/1")] == [1, 2, 3]


@pytest.mark.parametrize("shape", [(), (1, 1)])
def test_a_number_that_is_no_row_is_one(beside_one_of, shape):
    writer = beside_one_of(lambda tensor: tensor.new_full(shape, 2.5))
    assert {writer.value(tag, 3) for tag in writer.tags() if tag.startswith("mine/")} == {2.5}
    check_others(writer)


ODD = {
    "too many": (lambda x: x.new_ones(2), "shape (2,)"),
    "two dimensions": (lambda x: x.new_ones(2, 1), "shape (2, 1)"),
    "none": (lambda x: x.new_ones(0), "shape (0,)"),
    "sparse": (lambda x: x.new_ones(1).to_sparse(), ""),
    "nested": (lambda x: torch.nested.nested_tensor([x.new_ones(1)], layout=torch.jagged), ""),
    "complex": (lambda x: 1j * x.new_ones(1), "complex64"),
    "no tensor": (lambda x: [1.0], "list"),
    "meta": (lambda x: x.new_ones(1, device="meta"), ""),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_is_no_row_costs_the_probe_alone_and_is_said_by_its_name(beside_one_of, odd, caplog):
    compute, words = ODD[odd]
    writer = beside_one_of(compute)
    check_others(writer)
    said = [f"{record.getMessage()} {record.exc_info}" for record in caplog.records]
    assert [line for line in said if "Odd" in line and words in line]


@pytest.mark.parametrize("accumulated", [2, 70])
@pytest.mark.parametrize("combine", [lambda a, b: (a + b).repeat(2), lambda a, b: 1 / 0, lambda a, b: None])
def test_a_faulty_combine_costs_the_probe_alone(beside_one_of, combine, accumulated):
    check_others(beside_one_of(lambda tensor: tensor.new_ones(1), combine, accumulated))
