"""How many heads there are, and in which order they are folded, is told by where queries come from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.capture.attention.harness import record
from tests.capture.attention.reference import assert_close, per_head

B, N, H, D = 3, 5, 4, 8


class Folded(nn.Module):
    def __init__(self, fold, attend=None) -> None:
        super().__init__()
        self.qkv, self.fold = nn.Linear(H * D, 3 * H * D), fold
        scale = torch.logspace(-1, 1, H).repeat_interleave(D).repeat(3)
        self.qkv.weight.data *= scale[:, None]
        self.attend = attend or (lambda q, k, v: torch.bmm(torch.bmm(q, k.mT).softmax(-1), v))

    def forward(self, x):
        return self.attend(*(self.fold(t) for t in self.qkv(x).chunk(3, -1)))

    def logits(self, x):
        q, k, _ = (t.unflatten(-1, (H, D)).transpose(1, 2).double() for t in self.qkv(x).chunk(3, -1))
        return q @ k.mT


def batch_first(t):
    return t.reshape(B, N, H, D).permute(0, 2, 1, 3).reshape(B * H, N, D)


def heads_first(t):
    return t.reshape(B, N, H, D).permute(2, 0, 1, 3).reshape(H * B, N, D)


def tokens_first(t):
    """As fairseq has it."""
    return t.transpose(0, 1).contiguous().view(N, B * H, D).transpose(0, 1)


def by_stack(t):
    return torch.stack([t[..., i * D : (i + 1) * D] for i in range(H)], 1).flatten(0, 1)


def by_cat(t):
    return torch.cat(t.chunk(H, dim=-1))


def by_unbind(t):
    return torch.cat(t.unflatten(-1, (H, D)).unbind(2))


def by_einsum(t):
    return torch.einsum("bnhd->bhnd", t.view(B, N, H, D)).reshape(-1, N, D)


FOLDS = [batch_first, heads_first, tokens_first, by_stack, by_cat, by_unbind, by_einsum]


@pytest.mark.parametrize("name", ["h", "num_heads"])
@pytest.mark.parametrize("fold", FOLDS[:-1])
def test_folded_heads(fold, name):
    """`num_heads` says how many, but not in which order."""
    model, x = Folded(fold), torch.randn(B, N, H * D)
    setattr(model, name, H)
    assert_close(record(model, x).heads["root"], per_head(model.logits(x)))


def test_a_single_head_is_no_batch_of_several():
    """A batch of 4 with `num_heads = 2` for something else."""
    model, x = Folded(lambda t: t), torch.randn(4, N, H * D)
    model.num_heads = 2
    q, k, _ = (t.double() for t in model.qkv(x).chunk(3, -1))
    assert_close(record(model, x).heads["root"], per_head((q @ k.mT)[:, None]))


def test_heads_one_by_one_are_stacked_to_one_attention():
    def attend(q, k, v):
        parts = [a @ b.transpose(-1, -2) for a, b in zip(q.unbind(1), k.unbind(1), strict=True)]
        return torch.stack(parts, dim=1).softmax(-1) @ v

    model, x = Folded(lambda t: t.unflatten(-1, (H, D)).transpose(1, 2), attend), torch.randn(B, N, H * D)
    assert_close(record(model, x).heads["root"], per_head(model.logits(x)))


@pytest.mark.parametrize("order", ["batch", "heads"])
def test_heads_of_all_sequences_one_by_one_are_stacked_to_one_attention(order):
    def attend(q, k, v):
        q, k = (t.transpose(0, 1) if order == "heads" else t for t in (q, k))
        parts = [a @ b.mT for a, b in zip(q.flatten(0, 1), k.flatten(0, 1), strict=True)]
        s = torch.stack(parts).unflatten(0, q.shape[:2])
        return (s.transpose(0, 1) if order == "heads" else s).softmax(-1) @ v

    model, x = Folded(lambda t: t.unflatten(-1, (H, D)).transpose(1, 2), attend), torch.randn(B, N, H * D)
    assert_close(record(model, x).heads["root"], per_head(model.logits(x)))


class Apart(nn.Module):
    """Each head, or each token, has projections of its own."""

    def __init__(self, attend) -> None:
        super().__init__()
        self.qs, self.ks = (nn.ModuleList(nn.Linear(16, D) for _ in range(H)) for _ in range(2))
        self.mix, self.scale = nn.Parameter(torch.randn(H, H)), nn.Parameter(torch.randn(H, 4, D))
        self.bias, self.attend = nn.Parameter(torch.randn(H, N, N)), attend

    def forward(self, x):
        s = self.attend(self, x)
        self.logits = s.detach()
        return s.softmax(-1) @ x[:, None]


def of_linears(m, x):
    return torch.stack([q(x) for q in m.qs], 1) @ torch.stack([k(x) for k in m.ks], 1).mT


def of_scores(m, x):
    return torch.stack([q(x) @ k(x).mT for q, k in zip(m.qs, m.ks, strict=True)], 1)


def of_products(m, x):
    s = of_scores(m, x)
    return (m.mix[:, :, None, None] * s[:, None]).sum(2)


def of_a_product(m, x):
    return (m.mix @ of_scores(m, x).flatten(2)).unflatten(-1, (N, N))


def of_biases(m, x):
    return m.qs[0](x)[:, None] @ m.ks[0](x)[:, None].mT + m.bias


def of_inputs(m, x):
    q, k = (torch.einsum("bnhc,hcd->bhnd", x.unflatten(-1, (H, 4)), w) for w in (m.scale, m.scale.flip(1)))
    return q @ k.mT


@pytest.mark.parametrize("attend", [of_linears, of_scores, of_products, of_a_product, of_biases, of_inputs])
def test_heads_are_what_parameters_tell_apart(attend):
    model, x = Apart(attend), torch.randn(B, N, 16)
    assert_close(record(model, x).heads["root"], per_head(model.logits))


def test_tokens_that_parameters_of_their_own_make_are_tokens():
    def attend(m, x):
        tokens = torch.stack([f(x) for f in m.qs], 1)  # a token for each projection, as of a table's columns
        q, k = (tokens.unflatten(-1, (2, -1)).transpose(1, 2) @ w for w in m.scale[:2, :, :4].expand(2, 4, 4))
        return q @ k.mT

    class Tokens(Apart):
        def forward(self, x):
            s = self.attend(self, x)
            self.logits = s.detach()
            return s.softmax(-1) @ torch.ones(B, 2, H, 3).cumsum(2)

    model = Tokens(attend)
    assert_close(record(model, torch.randn(B, 16)).heads["root"], per_head(model.logits))


def test_heads_of_which_a_part_is_cut_out_across_sequences_are_said():
    def attend(q, k, v):
        q, k, v = (t.flatten(0, 1)[H - 1 : H + 2] for t in (q, k, v))
        return torch.bmm((q @ k.mT).softmax(-1), v)

    model = Folded(lambda t: t.unflatten(-1, (H, D)).transpose(1, 2), attend)
    seen = record(model, torch.randn(B, N, H * D))
    assert seen.heads == {}
    assert len(seen.uncovered) == 1


@pytest.mark.parametrize("way", ["expand", "repeat_interleave", "broadcast"])
def test_keys_that_heads_share(way):
    """Grouped queries and one key head."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(16, H * D), nn.Linear(16, 2 * D)

        def forward(self, x):
            q, k = (m(x).unflatten(-1, (-1, D)).transpose(1, 2) for m in (self.q, self.k))
            if way == "broadcast":
                s = (q.unflatten(1, (2, 2)) @ k.unsqueeze(2).mT).flatten(1, 2)
            elif way == "expand":
                s = q @ k[:, :, None].expand(-1, -1, 2, -1, -1).reshape(B, H, N, D).mT
            else:
                s = q @ k.repeat_interleave(2, dim=1).mT
            return s.softmax(-1) @ x[:, None]

    model, x = Shared(), torch.randn(B, N, 16)
    q, k = (m(x).unflatten(-1, (-1, D)).transpose(1, 2).double() for m in (model.q, model.k))
    assert_close(record(model, x).heads["root"], per_head(q @ k.repeat_interleave(2, 1).mT))
