"""Rows of several ranks, merged, are the rows of all their data together."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torchprobe
from tests.statistics.strategies import tensors
from torchprobe.buffer.step import WHOLE, Share
from torchprobe.distributed.mailbox import Part
from torchprobe.distributed.merge import Combiner, merge, same_data_groups
from torchprobe.probes.activations import ActivationGradients, UnitActivity
from torchprobe.probes.attention import AttentionWeights
from torchprobe.probes.base import Probe
from torchprobe.probes.gradients import Parameters
from torchprobe.probes.histograms import GradientHistograms, ParameterHistograms
from torchprobe.probes.provenance import Provenance
from torchprobe.statistics import calibration, intervals, uncertainty

OF_BATCHES = [torchprobe.Activations(every=1), ActivationGradients(1)]
OF_SHARDS = [torchprobe.Gradients(every=1), Parameters(1), GradientHistograms(1), ParameterHistograms(1)]


def by_name(probe: Probe) -> str:
    return type(probe).__name__


def cut(x: torch.Tensor, places: list[float]) -> list[torch.Tensor]:
    """Of unequal sizes, some of them empty."""
    ends = [0, *sorted(int(place * len(x)) for place in places), len(x)]
    return [x[a:b] for a, b in pairwise(ends)]


def row_of(probe: Probe, x: torch.Tensor) -> np.ndarray:
    return probe.compute_all([x]).double().numpy()


def each_alone(ranks: int) -> list[list[int]]:
    return [[rank] for rank in range(ranks)]


PLACES = st.lists(st.floats(0, 1), max_size=3)
ORDINARY = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("probe", OF_BATCHES, ids=by_name)
@given(x=tensors(ORDINARY), places=PLACES)
@settings(max_examples=60, deadline=None)
def test_batches_of_unequal_size_are_one_batch(probe, x, places):
    flat = x.reshape(-1)
    parts = {r: [Part("0", "", ["m"], row_of(probe, part))] for r, part in enumerate(cut(flat, places))}
    found = merge(probe, parts, each_alone(len(parts)))
    if by_name(probe) == "ActivationGradients":  # of the mean of the ranks' losses: each gradient counts one share
        scaled = row_of(probe, flat) * [[1 / len(parts) ** 2, 1]]
        if any(len(part) == 0 for part in cut(flat, places)):
            scaled = np.nan_to_num(scaled)  # nothing is finite, but an empty part says that its sum is 0
    else:
        scaled = row_of(probe, flat)
    assert found.names == ["m"]
    rounding = np.full_like(scaled, 1e-9)
    if by_name(probe) == "Activations":
        rounding[:, 1] += 1e-7 * flat[flat.isfinite()].double().abs().sum().item()  # of a sum that cancels
    assert np.isclose(found.rows, scaled, rtol=1e-5, atol=rounding, equal_nan=True).all(), (found.rows, scaled)


@pytest.mark.parametrize("probe", OF_SHARDS, ids=by_name)
@given(x=tensors(ORDINARY), places=PLACES)
@settings(max_examples=60, deadline=None)
def test_shards_of_unequal_size_are_the_whole_parameter(probe, x, places):
    flat = x.reshape(-1)
    pieces = [(r, part) for r, part in enumerate(cut(flat, places)) if len(part)]
    parts = {r: [Part("0", "", ["w"], row_of(probe, part), [Share(len(flat), len(part), 0)])] for r, part in pieces}
    found = merge(probe, parts, each_alone(len(parts)))
    if not pieces:
        assert found.names == []
        return
    assert (found.names, found.incomplete) == (["w"], [])
    np.testing.assert_allclose(found.rows, row_of(probe, flat), rtol=1e-5, atol=1e-12)


def test_a_parameter_with_a_missing_shard_is_left_out_and_named():
    probe = Parameters(1)
    parts = {
        0: [Part("0", "", ["w", "whole"], np.array([[3.0], [1.0]]), [Share(10, 4, 0), WHOLE])],
        1: [Part("0", "", ["w"], np.array([[4.0]]), [Share(10, 5, 0)])],
    }
    found = merge(probe, parts, each_alone(2))
    assert (found.names, found.incomplete) == (["whole"], ["w"])


def test_of_two_copies_of_a_parameter_the_complete_one_counts():
    parts = {
        0: [Part("0", "", ["w"], np.array([[3.0]]), [Share(10, 4, 0)])],
        2: [Part("0", "", ["w"], np.array([[6.0]]), [Share(10, 5, 2)])],
        3: [Part("0", "", ["w"], np.array([[8.0]]), [Share(10, 5, 2)])],
    }
    found = merge(Parameters(1), parts, each_alone(4))
    assert found.rows.tolist() == [[10.0]]


@pytest.mark.parametrize("sizes", [(3, 1), (1, 4, 2), (0, 2)])
def test_attention_of_every_head_over_all_ranks(sizes):
    probe = AttentionWeights()
    weights = torch.randn(sum(sizes), 4, 6, 6).softmax(-1)
    parts = {
        rank: [Part("0", "", ["a"] * 4, probe.compute(part).numpy())]
        for rank, part in enumerate(weights.split(list(sizes)))
    }
    found = merge(probe, parts, each_alone(len(sizes)))
    assert found.names == ["a"] * 4
    np.testing.assert_allclose(found.rows, probe.compute(weights).numpy(), rtol=1e-6)


def test_heads_that_ranks_have_of_the_same_examples_are_listed_and_replicas_count_once():
    probe = torchprobe.Attention(every=1)
    heads = np.random.default_rng(0).random((4, 9))
    halves = {rank: [Part("0", "", ["a", "a"], heads[2 * rank : 2 * rank + 2])] for rank in range(2)}
    assert merge(probe, halves, [[0, 1]]).rows.tolist() == heads.tolist()
    copies = {rank: [Part("0", "", ["a"] * 4, heads)] for rank in range(2)}
    assert merge(probe, copies, [[0, 1]]).rows.tolist() == heads.tolist()


@pytest.mark.parametrize("sizes", [(90, 10), (33, 1, 66), (0, 100)])
def test_calibration_uncertainty_and_coverage_of_all_examples(sizes):
    logits, targets = torch.randn(100, 5) * 3, torch.randint(-1, 5, (100,)).masked_fill_(torch.rand(100) < 0.1, -100)
    mean, variance, target = torch.randn(100), torch.rand(100), torch.randn(100)
    members = torch.randn(3, 100, 5).softmax(-1)
    rows = {
        torchprobe.Calibration(): lambda at: calibration.compute(logits[at].softmax(-1), targets[at]),
        torchprobe.Uncertainty(): lambda at: uncertainty.compute(uncertainty.classification(members[:, at])),
        torchprobe.Calibration().reporter().coverage: lambda at: intervals.compute(mean[at], variance[at], target[at]),
    }
    starts = np.cumsum([0, *sizes])
    for probe, row in rows.items():
        parts = {
            rank: [Part("0", "", ["x"], row(slice(starts[rank], starts[rank + 1])).double().numpy()[None])]
            for rank in range(len(sizes))
        }
        found = merge(probe, parts, each_alone(len(sizes)))
        np.testing.assert_allclose(found.rows[0], row(slice(None)).double().numpy(), rtol=1e-6, err_msg=str(probe))


def test_losses_and_shares_of_dead_units_are_means_over_ranks():
    loss, dead = torchprobe.Loss(), UnitActivity()
    parts = {r: [Part("0", "", ["x"], np.array([[value]]))] for r, value in enumerate((0.25, 0.75, np.nan))}
    known = {rank: parts[rank] for rank in (0, 1)}
    assert dict(loss.report_all(*merge(loss, known, each_alone(2))[:2])) == {"overview/loss": 0.5}
    assert dict(dead.report_all(*merge(dead, parts, each_alone(3))[:2])) == {"dead_units/x": 0.5}


def test_extremes_of_an_event_are_those_of_all_ranks():
    probe = Provenance()
    names = ["1 1 1 in fc", "2 2 1 out fc"]
    parts = {
        0: [Part("0", "", names, np.array([[-1.0, 2.0], [-3.0, 3.0]]))],
        1: [Part("0", "", names, np.array([[-5.0, 1.0], [np.nan, np.nan]]))],
    }
    found = merge(probe, parts, each_alone(2))
    np.testing.assert_array_equal(found.rows, [[-5.0, 2.0], [np.nan, np.nan]])
    ((tag, text),) = probe.report_all(found.names, found.rows)
    assert tag == "provenance/fc"
    assert "max |x| = 5" in text.markdown


def test_names_that_one_rank_alone_has_are_kept():
    probe = torchprobe.Activations(every=1)
    a, b = row_of(probe, torch.randn(5)), row_of(probe, torch.randn(7))
    found = merge(probe, {0: [Part("0", "", ["x"], a)], 1: [Part("0", "", ["y"], b)]}, each_alone(2))
    assert found.names == ["x", "y"]
    np.testing.assert_array_equal(found.rows, np.concatenate((a, b)))


def test_nothing_from_anyone_is_nothing():
    found = merge(torchprobe.Activations(every=1), {0: [Part("0", "", [], np.zeros((0, 6)))], 1: []}, each_alone(2))
    assert (found.names, len(found.rows), found.incomplete) == ([], 0, [])


def test_a_combine_that_raises_costs_the_other_ranks_values_and_one_line(caplog):
    class Broken(torchprobe.Probe):
        source, fields = "outputs", ("value",)

        def combine_rows(self, a, b):
            raise RuntimeError("no")

    combiner = Combiner({"0": Broken(every=1)})
    parts = {rank: [Part("0", "", ["x"], np.full((1, 1), float(rank)))] for rank in (0, 1)}
    for _ in range(2):
        (arrived,) = combiner(parts, each_alone(2))
        assert arrived.rows.tolist() == [[0.0]]
    assert caplog.text.count("cannot be combined over ranks") == 1


def test_groups_of_ranks_that_see_the_same_examples():
    assert same_data_groups({0: (), 1: (), 2: ()}) == [[0], [1], [2]]
    assert same_data_groups({0: (0, 1), 1: (1, 0), 2: (2, 3), 3: (2, 3)}) == [[0, 1], [2, 3]]


def test_ranks_are_in_one_group_by_way_of_others():
    """Two stages of a pipeline, each of them two ranks of tensor parallelism; a second copy of it on four more."""
    both = {0: (0, 1, 2), 1: (0, 1, 3), 2: (2, 3, 0), 3: (2, 3, 1)}
    copy = {rank + 4: tuple(other + 4 for other in others) for rank, others in both.items()}
    assert same_data_groups(both | copy) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert same_data_groups({0: (0, 1, 2), 2: ()}) == [[0, 2]]  # of rank 1 nothing was heard


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64, 100])
def test_many_ranks_are_one_batch_and_take_few_calls(ranks, monkeypatch):
    torch.manual_seed(0)
    probe, calls = torchprobe.Activations(every=1), []
    combine = type(probe).combine_rows
    monkeypatch.setattr(type(probe), "combine_rows", lambda self, a, b: calls.append(len(a)) or combine(self, a, b))
    sizes = [1 + (rank * 5) % 7 for rank in range(ranks)]
    scales = {"a": 1.0, "b": 1e3, "c": 1e-3}
    outputs = {n: [torch.randn(size, dtype=torch.float64) * by for size in sizes] for n, by in scales.items()}
    parts = {
        rank: [Part("0", "", list(outputs), np.concatenate([row_of(probe, x[rank]) for x in outputs.values()]))]
        for rank in range(ranks)
    }
    found = merge(probe, parts, each_alone(ranks))
    assert found.names == list(outputs)
    for row, tensors_of in zip(found.rows, outputs.values(), strict=True):
        np.testing.assert_allclose(row, row_of(probe, torch.cat(tensors_of))[0], rtol=1e-9, atol=1e-12)
    assert len(calls) == (ranks - 1).bit_length()


def test_ranks_whose_rows_differ_in_number_or_names_are_merged_by_name():
    probe = torchprobe.Activations(every=1)
    x, y, z = torch.ones(3), torch.full((2,), 4.0), torch.zeros(5)
    both = np.concatenate([row_of(probe, x), row_of(probe, y)])
    parts = {0: [Part("0", "", ["m", "n"], both)], 1: [Part("0", "", ["n"], row_of(probe, z))]}
    found = merge(probe, parts, each_alone(2))
    rows = dict(zip(found.names, found.rows, strict=True))
    np.testing.assert_allclose(rows["m"], row_of(probe, x)[0])
    np.testing.assert_allclose(rows["n"], row_of(probe, torch.cat((y, z)))[0])
