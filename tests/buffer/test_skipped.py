"""Steps that turn out to be skipped when their rows arrive."""

from __future__ import annotations

import torch

from torchprobe.buffer.decode import Decoder
from torchprobe.buffer.step import SKIPPED_BEFORE, Piece, StepBuffer, TransferBuffers


def test_steps_skipped_before_are_counted_in_the_record_that_tells_of_them_and_in_later_ones():
    decoder, buffers = Decoder({}), TransferBuffers(100)

    def told(step, skipped=None, void=None):
        rows = [] if skipped is None else [Piece(SKIPPED_BEFORE, ["skipped"], torch.tensor([[skipped]]))]
        content = StepBuffer(values={"overview/skipped_steps": 1.0}, pieces=rows, void=void)
        record = decoder(buffers.send(step, 0.0, content))
        return None if record is None else record.values["overview/skipped_steps"]

    assert [told(1), told(2, 2.0), told(3), told(4, void=torch.ones(())), told(5, 0.0)] == [1.0, 3.0, 3.0, None, 4.0]
    assert decoder.skipped == 3
