"""A step leaves with its device values and arrives whole, or says what it lost."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from torchprobe.buffer import seal as seal_module
from torchprobe.buffer.lane import Lane
from torchprobe.buffer.seal import SKIPPED, Lanes
from torchprobe.buffer.step import Piece, StepBuffer


class Rows:
    """A reporter that says what it was given."""

    def report_all(self, names, rows):
        yield from zip(names, rows.sum(1).tolist(), strict=True)


def arrived(sealed):
    return {(part.heading.names[0], *part.rows.shape): part.rows.sum() for part in sealed.arrive()}


def test_pieces_scalars_and_the_skipped_flag_arrive_in_one_transfer():
    probe = Rows()
    buffer = StepBuffer(
        values={"lr": 0.1},
        scalars={"train/loss": torch.tensor(2.0), "train/right": torch.tensor(True)},
        pieces=[Piece(probe, ["a", "b"], torch.ones(2, 3)), Piece(probe, ["c"], torch.full((1, 5), 2.0), "val/", True)],
        due=(probe,),
        void=torch.tensor(1.0),
    )
    sealed = Lanes(1000).seal(7, 123.0, buffer)
    assert (sealed.step, sealed.wall_time, sealed.values, sealed.due) == (7, 123.0, {"lr": 0.1}, (probe,))
    assert len(sealed.transfers) == 1
    assert not sealed.lost
    parts = sealed.arrive()
    assert [part.heading.prefix for part in parts] == ["", "val/", "", ""]
    assert [part.heading.counted for part in parts] == [False, True, False, False]
    assert [part.rows.tolist() for part in parts[2:]] == [[[2.0], [1.0]], [[1.0]]]
    assert parts[2].heading.names == ["train/loss", "train/right"]
    assert parts[3].heading.reporter is SKIPPED


def test_a_step_without_device_values_has_nothing_to_wait_for():
    sealed = Lanes(1000).seal(1, 0.0, StepBuffer(values={"lr": 0.1}))
    assert sealed.transfers == []
    assert sealed.arrive() == []


def test_a_sealed_step_keeps_no_device_rows_alive():
    rows = torch.ones(2, 3)
    alive = weakref.ref(rows)
    sealed = Lanes(1000).seal(1, 0.0, StepBuffer(pieces=[Piece(Rows(), ["a", "b"], rows)]))
    del rows
    gc.collect()
    assert alive() is None
    assert arrived(sealed) == {("a", 2, 3): 6.0}


def test_rows_that_find_no_room_are_lost_and_the_host_values_stay():
    lanes = Lanes(8)
    buffers = [StepBuffer(values={"n": float(n)}, scalars={"x": torch.tensor(n)}) for n in range(9)]
    sealed = [lanes.seal(n, 0.0, buffer) for n, buffer in enumerate(buffers)]
    assert [s.lost for s in sealed] == [False] * 8 + [True]
    assert sealed[8].values == {"n": 8.0}
    assert sealed[8].arrive() == []
    sealed[0].arrive()
    assert not lanes.seal(9, 0.0, buffers[0]).lost


def test_a_step_larger_than_the_slots_gets_larger_ones_and_what_is_under_way_still_arrives():
    lanes = Lanes(8)
    small = [lanes.seal(n, 0.0, StepBuffer(scalars={"x": torch.tensor(float(n))})) for n in range(3)]
    large = lanes.seal(3, 0.0, StepBuffer(pieces=[Piece(Rows(), ["a"], torch.full((1, 100), 2.0))]))
    again = lanes.seal(4, 0.0, StepBuffer(pieces=[Piece(Rows(), ["a"], torch.full((1, 100), 3.0))]))
    assert [s.arrive()[0].rows.tolist() for s in small] == [[[0.0]], [[1.0]], [[2.0]]]
    assert [arrived(large), arrived(again)] == [{("a", 1, 100): 200.0}, {("a", 1, 100): 300.0}]


def test_a_large_step_fits_wherever_a_small_one_is_under_way():
    lanes = Lanes(100)
    tiny = StepBuffer(scalars={"x": torch.tensor(1.0)})
    large = StepBuffer(pieces=[Piece(Rows(), ["a"], torch.ones(1, 49))])
    waiting = lanes.seal(0, 0.0, tiny)
    for n in range(30):  # never empty, so that positions wander through the buffer
        step = lanes.seal(n, 0.0, large)
        assert not step.lost
        waiting.arrive()
        waiting = lanes.seal(n, 0.0, tiny)
        assert arrived(step) == {("a", 1, 49): 49.0}


def test_crowded_lanes_say_so():
    lanes = Lanes(4)
    assert not lanes.crowded
    sealed = [lanes.seal(n, 0.0, StepBuffer(scalars={"x": torch.tensor(1.0)})) for n in range(3)]
    assert lanes.crowded
    sealed[0].arrive()
    assert not lanes.crowded


class Elsewhere(torch.Tensor):
    """A CPU tensor that says it lives on another device."""

    @property
    def device(self):
        return torch.device("mtia", 1)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})


@pytest.fixture
def two_devices(monkeypatch):
    """Lanes of every device on the CPU; the devices that lanes were made for."""
    made = []

    def lane(device, capacity):
        made.append(str(device))
        return Lane(torch.device("cpu"), capacity)

    monkeypatch.setattr(seal_module, "Lane", lane)
    return made


def elsewhere(*values):
    return torch.tensor(values).unsqueeze(0).as_subclass(Elsewhere)


def test_each_device_has_its_own_transfer(two_devices):
    probe = Rows()
    buffer = StepBuffer(
        scalars={"here": torch.tensor(1.0)},
        pieces=[Piece(probe, ["a"], torch.ones(1, 2)), Piece(probe, ["b"], elsewhere(3.0, 4.0))],
    )
    sealed = Lanes(100).seal(1, 0.0, buffer)
    assert two_devices == ["cpu", "mtia:1"]
    assert [[h.names for h in headings] for _, headings in sealed.transfers] == [[["a"], ["here"]], [["b"]]]
    assert [part.rows.tolist() for part in sealed.arrive()] == [[[1.0, 1.0]], [[1.0]], [[3.0, 4.0]]]


def test_a_device_that_fails_is_reported_once_the_others_have_their_slots_back(two_devices):
    lanes = Lanes(100)
    buffer = StepBuffer(pieces=[Piece(Rows(), ["a"], torch.ones(1, 20)), Piece(Rows(), ["b"], elsewhere(*[1.0] * 20))])
    for _ in range(20):  # more than the slots would hold
        sealed = lanes.seal(1, 0.0, buffer)
        assert not sealed.lost
        sealed.transfers[0][0]._wait = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            sealed.arrive()
    for ticket, _ in lanes.seal(2, 0.0, buffer).transfers:
        np.testing.assert_array_equal(ticket.take()[0], np.ones((1, 20)))


def test_nothing_is_sent_while_the_user_records_a_graph_of_a_device(two_devices, monkeypatch):
    monkeypatch.setattr(seal_module, "records_graph", lambda device: device.type == "mtia")
    buffer = StepBuffer(pieces=[Piece(Rows(), ["a"], torch.ones(1, 2)), Piece(Rows(), ["b"], elsewhere(1.0))])
    sealed = Lanes(100).seal(1, 0.0, buffer)
    assert two_devices == ["cpu"]
    assert sealed.lost
    assert arrived(sealed) == {("a", 1, 2): 2.0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_recorded_graph_is_whole_although_a_step_was_sealed_in_it():
    lanes, graph = Lanes(100), torch.cuda.CUDAGraph()
    x = torch.ones(1, 4, device="cuda")
    with torch.cuda.graph(graph):
        y = x * 2
        sealed = lanes.seal(1, 0.0, StepBuffer(pieces=[Piece(Rows(), ["a"], y)]))
    graph.replay()
    assert sealed.lost
    assert y.tolist() == [[2.0] * 4]
    assert arrived(lanes.seal(2, 0.0, StepBuffer(pieces=[Piece(Rows(), ["a"], y)]))) == {("a", 1, 4): 8.0}
