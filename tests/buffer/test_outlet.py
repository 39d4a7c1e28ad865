"""What leaves the training thread costs it next to nothing, and what torchprobe says of itself."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from torchprobe.buffer import outlet as outlet_module
from torchprobe.buffer.decode import Decoder
from torchprobe.buffer.drain import Drain
from torchprobe.buffer.outlet import Outlet, Overview
from torchprobe.buffer.step import Piece, StepBuffer, TransferBuffers
from torchprobe.writers.event_file import EventFileWriter
from torchprobe.writers.protocol import MemoryWriter

PATIENCE = 30.0


@pytest.fixture
def now(monkeypatch):
    """A clock that stands still until it is set."""
    clock = [100.0]
    monkeypatch.setattr(outlet_module, "monotonic", lambda: clock[0])
    return clock


def of(meter):
    return Overview(SimpleNamespace(drain=SimpleNamespace(dropped=2), decoder=SimpleNamespace(skipped=1)), meter)


def test_the_overhead_is_a_share_of_the_time_since_the_last_report(now):
    meter = SimpleNamespace(seconds=5.0)
    shown = of(meter)
    now[0], meter.seconds = 110.0, 6.0
    assert shown.values(3) == {
        "overview/probe_overhead": pytest.approx(0.1),
        "overview/dropped_records": 2.0,
        "overview/skipped_steps": 3.0,
    }
    now[0], meter.seconds = 120.0, 6.2
    assert shown.values(3)["overview/probe_overhead"] == pytest.approx(0.02)


def test_the_end_right_after_a_report_does_not_claim_all_of_the_time(now):
    meter = SimpleNamespace(seconds=0.0)
    shown = of(meter)
    now[0], meter.seconds = 110.0, 1.0
    shown.values(0)
    now[0], meter.seconds = 110.001, 1.02  # the last step's own share comes behind its report
    assert shown.values(0).keys() == {"overview/dropped_records", "overview/skipped_steps"}
    now[0], meter.seconds = 120.0, 2.0
    assert shown.values(0)["overview/probe_overhead"] == pytest.approx(0.1)


@pytest.fixture
def outlet():
    """An outlet, one step of which has had device values, and its writer."""
    decoder, writer = Decoder({}), MemoryWriter()
    outlet = Outlet(TransferBuffers(100), Drain(writer, decoder, 3600.0), decoder, 1000)
    outlet.hand_over(1, StepBuffer(scalars={"loss": torch.tensor(0.5)}))
    yield outlet, writer
    outlet.drain.close(PATIENCE)


def test_a_step_of_host_values_is_a_handful_of_calls_for_the_training_thread(outlet):
    out, writer = outlet
    calls = []
    step = StepBuffer(values={"lr": 0.1, "momentum": 0.9, "loss": 1.0})
    sys.setprofile(lambda frame, event, arg: calls.append(frame.f_code.co_name) if event == "call" else None)
    try:
        out.hand_over(2, step)
    finally:
        sys.setprofile(None)
    assert len(calls) <= 8, calls
    assert out.drain.flush(PATIENCE)
    assert writer.value("momentum", step=2) == 0.9


def test_steps_whose_rows_run_short_of_room_are_written_without_a_flush():
    written = threading.Event()

    class Telling(MemoryWriter):
        def write(self, records):
            super().write(records)
            if records[-1].step >= 51:
                written.set()

    decoder = Decoder({})
    drain = Drain(Telling(), decoder, 3600.0)
    out = Outlet(TransferBuffers(100), drain, decoder, 1000)
    for n in range(2, 61):  # more than half of what the buffer holds
        out.hand_over(n, StepBuffer(scalars={"loss": torch.tensor(float(n))}))
    assert written.wait(PATIENCE)
    assert drain.close(PATIENCE)


def test_what_a_run_lost_is_read_in_tensorboard(tmp_path):
    class Odd:
        def report_all(self, names, rows):
            yield "mine/odd", "high"
            yield "mine/sound", float(rows.sum())

    decoder = Decoder({})
    drain = Drain(EventFileWriter(tmp_path), decoder, 3600.0)
    out = Outlet(TransferBuffers(100), drain, decoder, 1000)
    for n in range(1, 4):
        out.hand_over(n, StepBuffer(values={"lr": None}, pieces=[Piece(Odd(), ["a"], torch.ones(1, 2))]))
    drain.stopped("ValueError: no such phase")
    assert drain.close(PATIENCE) is False
    shown = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in shown.Scalars("mine/sound")] == [(1, 2.0), (2, 2.0), (3, 2.0)]
    assert shown.SummaryMetadata("torchprobe/stopped").plugin_data.plugin_name == "text"
    (text,) = shown.Tensors("torchprobe/stopped")
    assert text.step == 3
    assert "no such phase" in make_ndarray(text.tensor_proto).item().decode()
