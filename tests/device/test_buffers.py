"""Rows on their way to the host, over streams that order nothing by themselves."""

from __future__ import annotations

import logging
import threading

import pytest
import torch

from tests.device import memory, operations, streams, tensors, waits
from torchprobe.buffer import transfer
from torchprobe.buffer.step import Piece, StepBuffer, TransferBuffers
from torchprobe.buffer.transfer import TransferBuffer


class Rows:
    def report_all(self, names, rows):
        yield from zip(names, rows[:, 0].tolist(), strict=True)


def drained(function):
    """What a function returns, or raises, in a thread such as the drain's."""
    found = []

    def run():
        try:
            found.append(function())
        except RuntimeError as error:
            found.append(error)

    thread = threading.Thread(target=run, name="torchprobe-drain")
    thread.start()
    thread.join(20)
    assert found, "it hangs"
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def taken(sent):
    return [part.rows.tolist() for part in drained(sent.arrive)]


# ---- that the stand-in fails where a GPU would give wrong numbers


def copy_without_order(device):
    """What this package once did: the stream that is current inside the block is the one that should wait."""
    slots, host, side = torch.ones(4, device=device), streams.pinned(4, torch.float32), streams.Stream(device)
    slots.record_stream(side)
    with streams.stream(side):
        side.wait_stream(streams.current_stream(device))
        host.copy_(slots, non_blocking=True)
    return slots, host, side


def test_a_copy_that_is_not_ordered_after_its_producer_is_found(fgpu):
    copy_without_order(fgpu)
    assert streams.found == ["a copy to the host reads what another stream wrote, and is not ordered after it"]
    streams.found.clear()


def test_a_slot_that_is_written_again_before_its_copy_is_done_is_found_and_spoils_the_copy(fgpu):
    slots, host, side = torch.ones(4, device=fgpu), streams.pinned(4, torch.float32), streams.Stream(fgpu)
    slots.record_stream(side)
    side.wait_stream(streams.current_stream(fgpu))
    with streams.stream(side):
        host.copy_(slots, non_blocking=True)
    slots.fill_(2.0)
    assert streams.found == ["aten::fill_ writes what another stream reads, and is not ordered after it"]
    side.synchronize()
    assert host.numpy().tolist() == [2.0] * 4
    streams.found.clear()


def test_a_slot_is_free_when_the_host_has_waited_for_its_copy(fgpu):
    slots, host, side = torch.ones(4, device=fgpu), streams.pinned(4, torch.float32), streams.Stream(fgpu)
    slots.record_stream(side)
    side.wait_stream(streams.current_stream(fgpu))
    with streams.stream(side):
        host.copy_(slots, non_blocking=True)
        done = side.record_event()
    done.synchronize()
    slots.fill_(2.0)
    assert host.numpy().tolist() == [1.0] * 4


def test_memory_that_is_not_known_to_be_in_use_on_another_stream_is_found(fgpu):
    slots, host, side = torch.ones(4, device=fgpu), streams.pinned(4, torch.float32), streams.Stream(fgpu)
    side.wait_stream(streams.current_stream(fgpu))
    with streams.stream(side):
        host.copy_(slots, non_blocking=True)
    assert [text for text in streams.found if "recorded on" in text]
    streams.found.clear()


def test_host_memory_that_is_read_too_early_has_not_arrived(fgpu):
    buffer = TransferBuffer(fgpu, 4)
    sent = buffer.send([torch.full((4,), 7.0, device=fgpu)])
    assert sent._host.numpy().tolist() != [7.0] * 4
    assert drained(sent.take)[0].tolist() == [7.0] * 4


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x.tolist(),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),  # a blocking copy
        lambda x: x.index_put_((torch.tensor([0], device="cpu"),), torch.ones((), device=x.device)),
        lambda x: torch.repeat_interleave(x.long()),
        lambda x: streams.pinned(4, torch.float32).copy_(x),  # without `non_blocking`
        lambda x: x.copy_(torch.ones(4, device="cpu")),
        lambda x: x.unique(),
        lambda x: streams.current_stream(x.device).record_event().synchronize(),
    ],
)
def test_what_waits_for_a_gpu_is_found_in_our_code_and_not_in_the_users(fgpu, wait, monkeypatch):
    x = torch.ones(4, device=fgpu)
    wait(x)
    assert waits.found == []
    monkeypatch.setattr(waits, "_OURS", __file__.removesuffix("test_buffers.py"))
    monkeypatch.setattr(waits, "_BETWEEN", (*waits._BETWEEN[:1], *DEVICE))
    with pytest.raises(waits.WaitError):
        wait(x)
    drained(lambda: wait(x))
    assert len(waits.found) == 1
    waits.found.clear()


DEVICE = [module.__file__ for module in (memory, operations, streams, tensors, waits)]


# ---- the buffers


def test_rows_arrive_as_they_were_when_they_were_sent_though_slots_are_used_again_and_again(fgpu):
    buffers, device = TransferBuffers(10), fgpu
    streams.machine.slow = 3
    for i in range(12):
        row = torch.full((1, 3), float(i), device=device)
        sent = buffers.send(i, 0.0, StepBuffer(pieces=[Piece(Rows(), ["a"], row)]))
        row.fill_(-1.0)
        assert taken(sent) == [[[float(i)] * 3]]


def test_several_steps_may_be_under_way(fgpu):
    buffers = TransferBuffers(100)
    sent = [
        buffers.send(i, 0.0, StepBuffer(scalars={"loss": torch.full((), float(i), device=fgpu)})) for i in range(20)
    ]
    assert [taken(one) for one in sent] == [[[[float(i)]]] for i in range(20)]


def test_without_room_a_step_is_lost_and_nothing_waits(fgpu):
    buffers = TransferBuffers(8)
    piece = Piece(Rows(), ["a"], torch.ones(1, 3, device=fgpu))
    sent = [buffers.send(i, 0.0, StepBuffer(pieces=[piece])) for i in range(5)]
    assert [one.lost for one in sent] == [False] * 4 + [True]
    assert [taken(one) for one in sent[:4]] == [[[[1.0] * 3]]] * 4


def test_a_larger_buffer_in_the_middle_of_a_run_leaves_alone_what_is_under_way(fgpu):
    buffers = TransferBuffers(8)
    small, large = torch.full((1, 3), 2.0, device=fgpu), torch.full((1, 30), 3.0, device=fgpu)
    before = buffers.send(1, 0.0, StepBuffer(pieces=[Piece(Rows(), ["a"], small)]))
    after = buffers.send(2, 0.0, StepBuffer(pieces=[Piece(Rows(), ["a"], large)]))
    again = buffers.send(3, 0.0, StepBuffer(pieces=[Piece(Rows(), ["a"], small)]))
    assert [taken(before), taken(after), taken(again)] == [[[[2.0] * 3]], [[[3.0] * 30]], [[[2.0] * 3]]]


def test_each_device_has_a_way_of_its_own(fgpu):
    other = torch.device("fgpu:1")
    pieces = [Piece(Rows(), ["a"], torch.full((1, 2), float(i), device=d)) for i, d in enumerate((fgpu, other, "cpu"))]
    sent = TransferBuffers(100).send(1, 0.0, StepBuffer(pieces=pieces))
    assert len(sent.transfers) == 3
    assert taken(sent) == [[[0.0] * 2], [[1.0] * 2], [[2.0] * 2]]


def test_rows_of_a_side_stream_are_waited_for_where_that_is_the_current_one(fgpu):
    buffers, side = TransferBuffers(100), streams.Stream(fgpu)
    with streams.stream(side):
        row = torch.full((1, 2), 5.0, device=fgpu)
        sent = buffers.send(1, 0.0, StepBuffer(pieces=[Piece(Rows(), ["a"], row)]))
    assert taken(sent) == [[[5.0] * 2]]


# ---- a device that is lost


def test_a_lost_device_costs_its_steps_a_time_out_and_one_line_in_the_log(fgpu, monkeypatch, caplog):
    monkeypatch.setattr(transfer, "PATIENCE", 0.2)
    buffers = TransferBuffers(100)
    content = StepBuffer(scalars={"loss": torch.ones((), device=fgpu)})
    streams.machine.lost = True
    first, second = buffers.send(1, 0.0, content), buffers.send(2, 0.0, content)
    with caplog.at_level(logging.ERROR, "torchprobe"):
        for sent in (first, second):
            with pytest.raises(RuntimeError, match="fgpu:0 is lost"):
                taken(sent)
    assert [r.getMessage() for r in caplog.records] == ["no copy from fgpu:0 has arrived for 0.2 s: it counts as lost"]
    assert buffers.send(3, 0.0, content).lost  # refused at once


def test_a_slow_device_is_not_lost_while_its_copies_arrive(fgpu, monkeypatch):
    monkeypatch.setattr(transfer, "PATIENCE", 0.5)
    monkeypatch.setattr(transfer, "_LAST_LOOK", 0.001)
    streams.machine.slow = 20
    buffers = TransferBuffers(100)
    content = StepBuffer(scalars={"loss": torch.ones((), device=fgpu)})
    sent = [buffers.send(i, 0.0, content) for i in range(30)]
    assert taken(sent[-1]) == [[[1.0]]]


# ---- while the user captures a graph


def test_while_a_stream_captures_nothing_is_sent(fgpu):
    buffers = TransferBuffers(100)
    content = StepBuffer(scalars={"loss": torch.ones((), device=fgpu)})
    with streams.captured():
        during = buffers.send(1, 0.0, StepBuffer(pieces=[Piece(Rows(), ["a"], torch.ones(1, 1, device=fgpu))]))
    after = buffers.send(2, 0.0, content)
    assert during.lost
    assert taken(after) == [[[1.0]]]


def test_the_drain_thread_waits_without_the_driver_while_another_thread_captures(fgpu):
    sent = TransferBuffers(100).send(1, 0.0, StepBuffer(scalars={"loss": torch.ones((), device=fgpu)}))
    with streams.captured():
        assert taken(sent) == [[[1.0]]]
