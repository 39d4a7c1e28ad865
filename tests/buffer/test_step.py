"""A step leaves with its device values and arrives whole, or says what it lost."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from torchprobe.buffer import step as step_module
from torchprobe.buffer.step import SKIPPED, Piece, StepBuffer, TransferBuffers
from torchprobe.buffer.transfer import TransferBuffer


class Rows:
    """A reporter that says what it was given."""

    def report_all(self, names, rows):
        yield from zip(names, rows.sum(1).tolist(), strict=True)


def arrived(sent):
    return {(part.heading.names[0], *part.rows.shape): part.rows.sum() for part in sent.arrive()}


def test_pieces_scalars_and_the_skipped_flag_arrive_in_one_transfer():
    probe = Rows()
    buffer = StepBuffer(
        values={"lr": 0.1},
        scalars={"train/loss": torch.tensor(2.0), "train/right": torch.tensor(True)},
        pieces=[Piece(probe, ["a", "b"], torch.ones(2, 3)), Piece(probe, ["c"], torch.full((1, 5), 2.0), "val/", True)],
        due=(probe,),
        void=torch.tensor(1.0),
    )
    sent = TransferBuffers(1000).send(7, 123.0, buffer)
    assert (sent.step, sent.wall_time, sent.values, sent.due) == (7, 123.0, {"lr": 0.1}, (probe,))
    assert len(sent.transfers) == 1
    assert not sent.lost
    parts = sent.arrive()
    assert [part.heading.prefix for part in parts] == ["", "val/", "", ""]
    assert [part.heading.counted for part in parts] == [False, True, False, False]
    assert [part.rows.tolist() for part in parts[2:]] == [[[2.0], [1.0]], [[1.0]]]
    assert parts[2].heading.names == ["train/loss", "train/right"]
    assert parts[3].heading.reporter is SKIPPED


def test_a_step_without_device_values_has_nothing_to_wait_for():
    sent = TransferBuffers(1000).send(1, 0.0, StepBuffer(values={"lr": 0.1}))
    assert sent.transfers == []
    assert sent.arrive() == []


def test_a_sealed_step_keeps_no_device_rows_alive():
    rows = torch.ones(2, 3)
    alive = weakref.ref(rows)
    sent = TransferBuffers(1000).send(1, 0.0, StepBuffer(pieces=[Piece(Rows(), ["a", "b"], rows)]))
    del rows
    gc.collect()
    assert alive() is None
    assert arrived(sent) == {("a", 2, 3): 6.0}


def test_rows_that_find_no_room_are_lost_and_the_host_values_stay():
    buffers = TransferBuffers(8)
    steps = [StepBuffer(values={"n": float(n)}, scalars={"x": torch.tensor(n)}) for n in range(9)]
    sent = [buffers.send(n, 0.0, content) for n, content in enumerate(steps)]
    assert [s.lost for s in sent] == [False] * 8 + [True]
    assert sent[8].values == {"n": 8.0}
    assert sent[8].arrive() == []
    sent[0].arrive()
    assert not buffers.send(9, 0.0, steps[0]).lost


def test_a_step_larger_than_the_slots_gets_larger_ones_and_what_is_under_way_still_arrives():
    buffers = TransferBuffers(8)
    small = [buffers.send(n, 0.0, StepBuffer(scalars={"x": torch.tensor(float(n))})) for n in range(3)]
    large = buffers.send(3, 0.0, StepBuffer(pieces=[Piece(Rows(), ["a"], torch.full((1, 100), 2.0))]))
    again = buffers.send(4, 0.0, StepBuffer(pieces=[Piece(Rows(), ["a"], torch.full((1, 100), 3.0))]))
    assert [s.arrive()[0].rows.tolist() for s in small] == [[[0.0]], [[1.0]], [[2.0]]]
    assert [arrived(large), arrived(again)] == [{("a", 1, 100): 200.0}, {("a", 1, 100): 300.0}]


def test_a_large_step_fits_wherever_a_small_one_is_under_way():
    buffers = TransferBuffers(100)
    tiny = StepBuffer(scalars={"x": torch.tensor(1.0)})
    large = StepBuffer(pieces=[Piece(Rows(), ["a"], torch.ones(1, 49))])
    waiting = buffers.send(0, 0.0, tiny)
    for n in range(30):  # never empty, so that positions wander through the buffer
        step = buffers.send(n, 0.0, large)
        assert not step.lost
        waiting.arrive()
        waiting = buffers.send(n, 0.0, tiny)
        assert arrived(step) == {("a", 1, 49): 49.0}


def test_crowded_buffers_say_so():
    buffers = TransferBuffers(4)
    assert not buffers.crowded
    sent = [buffers.send(n, 0.0, StepBuffer(scalars={"x": torch.tensor(1.0)})) for n in range(3)]
    assert buffers.crowded
    sent[0].arrive()
    assert not buffers.crowded


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
    """Transfer buffers of every device on the CPU; the devices that buffers were made for."""
    made = []

    def buffer(device, capacity):
        made.append(str(device))
        return TransferBuffer(torch.device("cpu"), capacity)

    monkeypatch.setattr(step_module, "TransferBuffer", buffer)
    return made


def elsewhere(*values):
    return torch.tensor(values).unsqueeze(0).as_subclass(Elsewhere)


def test_each_device_has_its_own_transfer(two_devices):
    probe = Rows()
    buffer = StepBuffer(
        scalars={"here": torch.tensor(1.0)},
        pieces=[Piece(probe, ["a"], torch.ones(1, 2)), Piece(probe, ["b"], elsewhere(3.0, 4.0))],
    )
    sent = TransferBuffers(100).send(1, 0.0, buffer)
    assert two_devices == ["cpu", "mtia:1"]
    assert [[h.names for h in headings] for _, headings in sent.transfers] == [[["a"], ["here"]], [["b"]]]
    assert [part.rows.tolist() for part in sent.arrive()] == [[[1.0, 1.0]], [[1.0]], [[3.0, 4.0]]]


def test_a_device_that_fails_is_reported_once_the_others_have_their_slots_back(two_devices):
    buffers = TransferBuffers(100)
    buffer = StepBuffer(pieces=[Piece(Rows(), ["a"], torch.ones(1, 20)), Piece(Rows(), ["b"], elsewhere(*[1.0] * 20))])
    for _ in range(20):  # more than the slots would hold
        sent = buffers.send(1, 0.0, buffer)
        assert not sent.lost
        sent.transfers[0][0]._wait = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            sent.arrive()
    for transfer, _ in buffers.send(2, 0.0, buffer).transfers:
        np.testing.assert_array_equal(transfer.take()[0], np.ones((1, 20)))


def test_nothing_is_sent_while_the_user_records_a_graph_of_a_device(two_devices, monkeypatch):
    monkeypatch.setattr(step_module, "records_graph", lambda device: device.type == "mtia")
    buffer = StepBuffer(pieces=[Piece(Rows(), ["a"], torch.ones(1, 2)), Piece(Rows(), ["b"], elsewhere(1.0))])
    sent = TransferBuffers(100).send(1, 0.0, buffer)
    assert two_devices == ["cpu"]
    assert sent.lost
    assert arrived(sent) == {("a", 1, 2): 2.0}


@pytest.mark.parametrize(
    "odd",
    [torch.ones(1, 2, dtype=torch.complex64), torch.ones(2, 2).to_sparse(), torch.ones(1, 2, device="meta")],
    ids=["complex", "sparse", "meta"],
)
def test_rows_that_cannot_be_copied_cost_themselves_alone_and_are_said_once(odd, caplog):
    class Odd(Rows):
        pass

    buffers = TransferBuffers(100)
    for _ in range(3):
        pieces = [Piece(Odd(), ["odd"], odd), Piece(Rows(), ["a"], torch.ones(1, 2))]
        sent = buffers.send(1, 0.0, StepBuffer(pieces=pieces, scalars={"loss": torch.tensor(4.0)}))
        assert arrived(sent) == {("a", 1, 2): 2.0, ("loss", 1, 1): 4.0}
    (logged,) = caplog.messages
    assert "Odd" in logged


@pytest.mark.parametrize("odd", [torch.ones(2), torch.ones((), device="meta")], ids=["several", "meta"])
def test_a_logged_tensor_that_is_no_number_costs_itself_alone_and_is_said_once(odd, caplog):
    buffers = TransferBuffers(100)
    for _ in range(3):
        content = StepBuffer(scalars={"lr/group_0": odd, "loss": torch.tensor(4.0)}, values={"n": 1.0})
        sent = buffers.send(1, 0.0, content)
        assert arrived(sent) == {("loss", 1, 1): 4.0}
    (logged,) = caplog.messages
    assert "lr/group_0" in logged


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_recorded_graph_is_whole_although_a_step_was_sealed_in_it():
    buffers, graph = TransferBuffers(100), torch.cuda.CUDAGraph()
    x = torch.ones(1, 4, device="cuda")
    with torch.cuda.graph(graph):
        y = x * 2
        sent = buffers.send(1, 0.0, StepBuffer(pieces=[Piece(Rows(), ["a"], y)]))
    graph.replay()
    assert sent.lost
    assert y.tolist() == [[2.0] * 4]
    assert arrived(buffers.send(2, 0.0, StepBuffer(pieces=[Piece(Rows(), ["a"], y)]))) == {("a", 1, 4): 8.0}
