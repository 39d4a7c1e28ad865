"""Padding that an argument names, where tokens pass what does not say that they stay: followed, told by a mask, or not
told."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.capture.attention.attends import HEADS, LENGTH, Attends, scores
from tests.capture.attention.harness import record
from tests.capture.attention.reference import assert_close, of_weights, per_head
from torchprobe import Attention, instrument
from torchprobe.capture.compat import no_torch_function
from torchprobe.testing import MemoryWriter

TAKEN = torch.arange(LENGTH) < torch.tensor([LENGTH, 4, 2, 5, 3, 6, 1])[:, None]  # as many sequences as tokens
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
X = torch.randn(LENGTH, LENGTH, 16)
PLACES = torch.tensor([3, 1, 0, 5, 4, 2, 6])
EACH = torch.stack([PLACES.roll(i) for i in range(LENGTH)])
ANGLES = torch.tensor([1.0, 0.1, 0.01, 0.001])
RECURRENT = nn.GRU(16, 16, batch_first=True)


def weights(q, k, seen):
    return scores(q, k).masked_fill(~seen, -math.inf).softmax(-1)


class Fused(Attends):
    """Its weights are computed unseen."""

    def forward(self, x, seen):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        q, k = self.weigh(q), self.weigh(k)
        with no_torch_function():
            self.p = weights(q.detach(), k.detach(), seen)
        if seen.dim() > 2:
            return F.scaled_dot_product_attention(q, k, v, seen)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def plain(x):
    return x


class Loses(nn.Module):
    """mask: which tokens of those that it attends to its mask shows; None: all."""

    def __init__(self, inner, way, mask=None) -> None:
        super().__init__()
        self.inner, self.way, self.mask = inner, way, mask

    def forward(self, x, attention_mask):
        self.seen = CAUSAL if self.mask is None else self.mask(attention_mask)[:, None, None] & CAUSAL
        return self.inner(self.way(x), self.seen)


def assert_counted(model, counted):
    """counted: bool (batch, queries)."""
    writer = MemoryWriter()
    with instrument(model, writer=writer, probes=[Attention(every=1)], rules=[]):
        model(X, TAKEN).nan_to_num().sum().backward()
        torch.optim.SGD(model.parameters(), 0.0).step()
    heads = of_weights(model.inner.p.nan_to_num(), counted[:, None], model.seen)
    for tag in ("entropy", "sink", "distance"):
        want = sum(head[tag] for head in heads) / HEADS
        assert writer.value(f"attention_{tag}/inner") == pytest.approx(want, abs=1e-4)


FOLLOWED = {
    "sorted": lambda x: x.sort(-1).values,
    "the largest": lambda x: x.topk(16)[0],
    "transformed": lambda x: torch.fft.fft(x).real,
    "gated": lambda x: F.glu(torch.cat((x, x), -1)),
    "gathered": lambda x: x.gather(-1, x.argsort(-1)),
    "picked": lambda x: x.index_select(2, torch.arange(15, -1, -1)),
    "the largest so far": lambda x: x.cummax(1)[0],
    "element by element": lambda x: F.softsign(F.logsigmoid(torch.special.i0e(x))),
    "a product of the same elements": lambda x: torch.einsum("bld,bld->bld", x, x),
    "complex numbers": lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (8, 2))) * 1j).flatten(2),
    "pooled": lambda x: F.max_pool1d(x.mT, 3, 1, 1).mT,
    "transposed convolution": lambda x: F.conv_transpose1d(x.mT, RECURRENT.weight_hh_l0[:16, :, None]).mT,
}
TOLD = {
    "where they were": lambda x: x[:, torch.arange(LENGTH)],
    "gathered where they were": lambda x: x.gather(1, torch.arange(LENGTH)[None, :, None].expand(x.shape)),
    "selected where they were": lambda x: x.index_select(1, torch.arange(LENGTH)),
    "flat and back": lambda x: x.flatten(0, 1)[torch.arange(LENGTH**2)].view(x.shape),
    "recurrent": lambda x: RECURRENT(x)[0],
    "one after the other": lambda x: torch.stack([torch.erfinv(t.mT.tanh()).mT.sort(0)[0] for t in x.unbind(1)], 1),
    "mapped": torch.func.vmap(lambda x: x * 2),
    "written into another": lambda x: (
        torch.zeros(LENGTH**2, 16).index_add(0, torch.arange(LENGTH**2), x.flatten(0, 1)).view(x.shape)
    ),
}
MOVED = {
    "picked": (lambda x: x[:, PLACES], lambda taken: taken[:, PLACES]),
    "selected": (lambda x: x.index_select(1, PLACES), lambda taken: taken[:, PLACES]),
    "gathered": (lambda x: x.gather(1, EACH[..., None].expand(x.shape)), lambda taken: taken.gather(1, EACH)),
    "other sequences": (lambda x: x[PLACES], lambda taken: taken[PLACES]),
    "the largest": (lambda x: x.topk(LENGTH, 1)[0], lambda taken: taken[:, PLACES]),
}
MIXED = {
    "sorted": lambda x: x.sort(1)[0],
    "transformed": lambda x: torch.fft.fft(x, dim=1).real,
    "quantiles": lambda x: x.quantile(torch.arange(LENGTH) / LENGTH, 1),  # (quantiles, batch, width)
    "in another order": lambda x: x.gather(1, EACH[..., None].expand(x.shape)),
}


@pytest.mark.parametrize("how", FOLLOWED)
def test_tokens_are_followed_through_what_goes_along_other_dimensions(how):
    assert_counted(Loses(Fused(plain), FOLLOWED[how]), TAKEN)


@pytest.mark.parametrize("how", TOLD)
def test_lost_tokens_are_those_of_an_argument_where_their_mask_hides_what_it_says(how):
    assert_counted(Loses(Fused(plain), TOLD[how], plain), TAKEN)
    assert_counted(Loses(Attends(lambda m, q, k, seen: weights(q, k, seen)), TOLD[how], plain), TAKEN)


@pytest.mark.parametrize("how", MOVED)
def test_a_mask_that_hides_other_tokens_does_not_tell_it(how):
    way, mask = MOVED[how]
    assert_counted(Loses(Fused(plain), way, mask), torch.ones_like(TAKEN))


@pytest.mark.parametrize("how", MIXED)
def test_what_mixes_or_moves_tokens_leaves_nothing_told(how):
    assert_counted(Loses(Fused(plain), MIXED[how]), torch.ones_like(TAKEN))


def angles(x):
    """Of as many positions: made of what no module owns."""
    return (ANGLES[None, :, None].expand(len(x), -1, -1) @ torch.arange(1.0 * x.size(-2))[None, None]).mT[:, None]


def turned(x):
    a = torch.cat((angles(x), angles(x)), -1)
    return x * a.cos() + torch.cat((-x[..., 4:], x[..., :4]), -1) * a.sin()


def turned_as_complex(x):
    turn = torch.polar(torch.ones(x.size(-2), 4), torch.outer(torch.arange(1.0 * x.size(-2)), ANGLES))
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * turn).flatten(3)


@pytest.mark.parametrize("turn", [turned, turned_as_complex, lambda x: x * angles(x).repeat(1, HEADS, 1, 2)])
def test_angles_are_no_tokens(turn):
    assert_counted(Loses(Fused(turn), plain), TAKEN)
    assert_counted(Loses(Attends(lambda m, q, k, seen: weights(turn(q), turn(k), seen)), plain), TAKEN)


class Across(Fused):
    """Asks with others than the tokens that are its keys, as many."""

    def forward(self, x, seen):
        others = torch.randn(x.shape).sort(1)[0]
        q, k, v = (
            t.chunk(3, -1)[i].unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for i, t in enumerate((self.qkv(others), self.qkv(x), self.qkv(x)))
        )
        with no_torch_function():
            self.p = weights(q.detach(), k.detach(), seen)
        return F.scaled_dot_product_attention(q, k, v, seen)


@pytest.mark.parametrize("way", [plain, MIXED["sorted"]])
def test_others_than_the_keys_are_no_padding_of_theirs(way):
    assert_counted(Loses(Across(plain), way, plain), torch.ones_like(TAKEN))


class Convolved(Fused):
    """Queries, keys and values pass a short convolution each."""

    def forward(self, x, seen):
        parts = zip(self.qkv(x).chunk(3, -1), self.kernels, strict=True)
        q, k, v = (self.weigh(t.mT, w).mT.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t, w in parts)
        with no_torch_function():
            self.p = weights(q.detach(), k.detach(), seen)
        return F.scaled_dot_product_attention(q, k, v, seen)


CONVOLVED = {
    "as long": lambda t, w: F.conv1d(t, w, padding=1, groups=16),
    "padded before": lambda t, w: F.conv1d(F.pad(t, (2, 0)), w, groups=16),
    "padded by other values": lambda t, w: F.conv1d(F.pad(t, (1, 1), mode="replicate"), w, groups=16),
    "cut after": lambda t, w: F.conv1d(t, w, None, (1,), (2,), (1,), 16)[..., :LENGTH],
    "cut after all channels were mixed": lambda t, w: F.conv1d(t, w.expand(16, 16, 3), padding=2)[..., :-2],
}


@pytest.mark.parametrize("way", CONVOLVED.values(), ids=CONVOLVED.keys())
def test_tokens_are_followed_through_convolutions_that_leave_as_many(way):
    kernels = nn.ParameterList(nn.Parameter(torch.randn(16, 1, 3) / 2) for _ in range(3))
    assert_counted(Loses(Convolved(way, kernels=kernels), plain, lambda taken: taken), TAKEN)


class Zeroed(nn.Module):
    """Self-attention, whose output is zeroed at padded tokens; then attention to something else."""

    def __init__(self, zero) -> None:
        super().__init__()
        self.q, self.k, self.v, self.other = (nn.Linear(16, 16) for _ in range(4))
        self.zero = zero

    def forward(self, x, memory, keep):
        q, k = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (self.q(x), self.k(x)))
        seen = (q @ k.mT).masked_fill(~keep[:, None, None], -1e9).softmax(-1)
        x = self.zero(keep[..., None], self.v((seen @ q).transpose(1, 2).flatten(2))) + x
        s = self.other(x) @ memory.mT
        self.logits = s.detach()[:, None]
        return s.softmax(-1) @ memory


@pytest.mark.parametrize(
    "zero",
    [lambda keep, x: torch.where(keep, x, 0.0), lambda keep, x: keep * x, lambda keep, x: keep.float() * x],
    ids=["where", "times", "as numbers"],
)
def test_tokens_are_known_behind_a_mask_that_zeroes_them(zero):
    keep = torch.arange(9) < torch.tensor([9, 5, 7])[:, None]
    model = Zeroed(zero)
    found = record(model, torch.randn(3, 9, 16), torch.randn(3, 6, 16), keep).heads
    assert_close(found["root/cross"], per_head(model.logits, ~keep))
