"""Of several results of one operation, which autograd gives no gradient where the loss leaves them out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchprobe
from torchprobe.testing import MemoryWriter


class Twice(torch.autograd.Function):
    """Of its two results a loss may leave out the first, which has no gradient then."""

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        return 2 * x, 3 * x

    @staticmethod
    def backward(ctx, a, b):
        return (0 if a is None else 2 * a) + (0 if b is None else 3 * b)


class TwiceAttention(nn.Module):
    """Its name alone makes it one that is watched."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return Twice.apply(x)


class LastState(nn.Module):
    """Uses of a part what it returns beside its first output, as the last state of an `nn.LSTM`."""

    def __init__(self, part: nn.Module, first: bool) -> None:
        super().__init__()
        self.before, self.part, self.head, self.first = nn.Linear(4, 4), part, nn.Linear(4, 3), first

    def forward(self, x: Tensor) -> Tensor:
        found = self.part(self.before(x))
        other = found[1][0][-1] if isinstance(found[1], tuple) else found[1]
        return self.head(found[0][-1] if self.first else other)


@pytest.mark.parametrize("part", [lambda: nn.LSTM(4, 4), TwiceAttention], ids=["LSTM", "function"])
@pytest.mark.parametrize("first", [False, True])
def test_an_output_that_the_loss_leaves_out_never_fails_a_backward_pass(caplog, part, first):
    def run(probed: bool):
        torch.manual_seed(0)
        model, writer = LastState(part(), first), MemoryWriter()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        session = torchprobe.instrument(model, writer=writer, every=1) if probed else None
        for _ in range(3):
            z = model(torch.randn(5, 6, 4))
            optimizer.zero_grad()
            F.cross_entropy(z.reshape(-1, 3), torch.randint(0, 3, (len(z.reshape(-1, 3)),))).backward()
            optimizer.step()
        if session is not None:
            session.detach()
            tags = {f"activation_grad_norm/{name}" for name in ("before", "head")}
            assert tags <= set(writer.tags())
            assert ("activation_grad_norm/part" in writer.tags()) is first
        return list(model.state_dict().values())

    assert all(map(torch.equal, run(False), run(True)))
    assert not [record for record in caplog.records if "switched off" in record.getMessage()]
