"""What is sent arrives, whatever its shape and type, and the slots are free again."""

from __future__ import annotations

import threading
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchprobe.buffer.transfer import Transfer, TransferBuffer

CPU = torch.device("cpu")


def test_rows_of_any_shape_and_type_arrive_as_float64():
    rows = [
        torch.randn(3, 4),
        torch.empty(0, 3),
        torch.randn(2, 2, dtype=torch.bfloat16),
        torch.tensor([[2**53 - 1], [-(2**40) - 1]]),  # beyond what bfloat16 or float32 hold
        torch.tensor([[True], [False]]),
        torch.randn(5, 6, dtype=torch.float64).T,
        torch.arange(12.0).reshape(3, 4)[:, ::2],
        torch.tensor(7.5),
        torch.ones(1, 1).expand(4, 2),
    ]
    arrived = TransferBuffer(CPU, 200).send(rows).take()
    assert [part.shape for part in arrived] == [tuple(row.shape) for row in rows]
    assert {part.dtype for part in arrived} == {np.dtype(np.float64)}
    for part, row in zip(arrived, rows, strict=True):
        np.testing.assert_array_equal(part, row.double().numpy())


@pytest.mark.parametrize("rows", [[], [torch.empty(0, 3)], [torch.empty(0)] * 3])
def test_rows_without_elements_arrive_and_take_no_room(rows):
    buffer = TransferBuffer(CPU, 4)
    transfer = buffer.send(rows)
    full = buffer.send([torch.ones(4)])
    assert [part.shape for part in transfer.take()] == [tuple(row.shape) for row in rows]
    assert full.take()[0].tolist() == [1.0] * 4


shapes = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(shapes, min_size=1, max_size=8), st.integers(0, 3))
def test_any_sequence_of_sends_arrives_unchanged(steps, lag):
    buffer, under_way, number = TransferBuffer(CPU, 2000), deque(), 0.0
    for shape_list in steps:
        rows = []
        for shape in shape_list:
            size = int(np.prod(shape))
            rows.append(torch.arange(number, number + size).reshape(shape))
            number += size
        under_way.append(([row.numpy().copy() for row in rows], buffer.send(rows)))
        while len(under_way) > lag:
            expected, transfer = under_way.popleft()
            for part, array in zip(transfer.take(), expected, strict=True):
                np.testing.assert_array_equal(part, array)


def test_what_arrived_does_not_change_when_its_slot_is_used_again():
    buffer = TransferBuffer(CPU, 3)
    first = buffer.send([torch.ones(3)]).take()
    buffer.send([torch.zeros(3)])
    assert first[0].tolist() == [1.0, 1.0, 1.0]


def test_what_was_sent_arrives_although_the_sender_changes_it():
    row = torch.ones(3)
    transfer = TransferBuffer(CPU, 3).send([row])
    row.zero_()
    assert transfer.take()[0].tolist() == [1.0, 1.0, 1.0]


def test_a_send_that_does_not_fit_is_refused_and_fits_after_a_take():
    buffer = TransferBuffer(CPU, 5)
    first = buffer.send([torch.ones(3)])
    assert buffer.send([torch.ones(3)]) is None
    first.take()
    assert buffer.send([torch.full((3,), 2.0)]).take()[0].tolist() == [2.0] * 3
    assert buffer.send([torch.ones(6)]) is None


def test_half_taken_is_crowded_until_it_is_taken():
    buffer = TransferBuffer(CPU, 5)
    transfer = buffer.send([torch.ones(3)])
    assert buffer.crowded
    transfer.take()
    assert not buffer.crowded


@pytest.mark.parametrize("broken", ["wait", "copy"])
def test_a_slot_is_free_although_reading_it_failed(broken):
    freed = []

    def wait():
        if broken == "wait":
            raise RuntimeError("device lost")

    host = torch.empty(2, device="meta") if broken == "copy" else torch.ones(2)
    transfer = Transfer(host, [torch.Size([2])], wait, lambda: freed.append(True))
    with pytest.raises((RuntimeError, NotImplementedError)):
        transfer.take()
    assert freed == [True]


def test_rows_that_cannot_be_sent_leave_the_buffer_as_it_was():
    buffer = TransferBuffer(CPU, 4)
    for _ in range(3):
        with pytest.raises((TypeError, RuntimeError), match="can't be cast"):  # a RuntimeError in torch 2.6
            buffer.send([torch.ones(3, dtype=torch.complex64)])
    assert buffer.send([torch.ones(4)]).take()[0].tolist() == [1.0] * 4


def test_a_buffer_made_in_inference_mode_serves_outside_it_and_the_other_way_round():
    with torch.inference_mode():
        buffer = TransferBuffer(CPU, 4)
        inside = buffer.send([torch.ones(2)])
    outside = buffer.send([torch.full((2,), 2.0)])
    assert [*inside.take()[0], *outside.take()[0]] == [1, 1, 2, 2]
    with torch.inference_mode():
        assert buffer.send([torch.full((4,), 3.0)]).take()[0].tolist() == [3.0] * 4


def test_the_users_modes_change_nothing():
    third = torch.tensor([1 / 3], dtype=torch.float64)
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        arrived = (
            TransferBuffer(CPU, 4).send([third.requires_grad_(), torch.tensor([2.5], device="cpu").bfloat16()]).take()
        )
    assert [part.item() for part in arrived] == [1 / 3, 2.5]


def test_one_thread_sends_and_another_takes():
    buffer, transfers, sums = TransferBuffer(CPU, 64), deque(), []
    sent, taken = threading.Semaphore(0), threading.Semaphore(0)

    def take_all():
        for _ in range(300):
            sent.acquire()
            sums.append([part.sum() for part in transfers.popleft().take()])
            taken.release()

    taker = threading.Thread(target=take_all)
    taker.start()
    for i in range(300):
        rows = [torch.full((1 + i % 7, 2), float(i)), torch.full((i % 5,), -1.0)]
        while (transfer := buffer.send(rows)) is None:
            taken.acquire()
        transfers.append(transfer)
        sent.release()
    taker.join()
    assert sums == [[2.0 * i * (1 + i % 7), -1.0 * (i % 5)] for i in range(300)]


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


@on_gpu
def test_on_a_gpu_nothing_waits_for_the_device():
    device = torch.device("cuda", torch.cuda.current_device())
    buffer = TransferBuffer(device, 1000)
    rows = [torch.randn(30, 4, device=device), torch.randn(5, device=device).bfloat16()]
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        transfers = [buffer.send(rows) for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    for transfer in transfers:
        for part, row in zip(transfer.take(), rows, strict=True):
            np.testing.assert_array_equal(part, row.double().cpu().numpy())


@on_gpu
def test_on_a_gpu_a_copy_waits_for_what_computes_its_rows():
    device = torch.device("cuda", torch.cuda.current_device())
    buffer, side = TransferBuffer(device, 3000), torch.cuda.Stream()
    for stream in (torch.cuda.current_stream(), side):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            transfer = buffer.send([torch.full((1000,), 3.0, device=device)])
        assert transfer.take()[0].tolist() == [3.0] * 1000


@on_gpu
def test_on_a_gpu_slots_are_used_again_only_when_their_copy_has_arrived():
    device = torch.device("cuda", torch.cuda.current_device())
    buffer, transfers, wrong = TransferBuffer(device, 5000), deque(), []
    sent, taken = threading.Semaphore(0), threading.Semaphore(0)

    def take_all():
        for i in range(300):
            sent.acquire()
            wrong.extend(value for value in transfers.popleft().take()[0].tolist() if value != i)
            taken.release()

    taker = threading.Thread(target=take_all)
    taker.start()
    for i in range(300):
        while (transfer := buffer.send([torch.full((1700,), float(i), device=device)])) is None:
            taken.acquire()
        transfers.append(transfer)
        sent.release()
    taker.join()
    assert not wrong


@on_gpu
def test_on_a_gpu_another_default_device_changes_nothing():
    device = torch.device("cuda", torch.cuda.current_device())
    with device:
        assert TransferBuffer(device, 4).send([torch.ones(4)]).take()[0].tolist() == [1.0] * 4


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's list of threads")
def test_taking_many_rows_starts_no_threads_that_would_compete_with_training():
    buffer = TransferBuffer(torch.device("cpu"), 2**20)
    threads: list[int] = []

    def take() -> None:
        before = len(list(Path("/proc/self/task").iterdir()))
        transfer.take()
        threads.append(len(list(Path("/proc/self/task").iterdir())) - before)

    transfer = buffer.send([torch.ones(2**20, dtype=torch.float64)])
    taker = threading.Thread(target=take)
    taker.start()
    taker.join()
    assert threads == [0]
