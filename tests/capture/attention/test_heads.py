"""How many heads there are, and in which order they are folded, is told by where queries come from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.capture.attention.harness import record
from tests.capture.attention.passes import sdpa
from tests.capture.attention.reference import assert_close, logits_of, per_head

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


def by_cat_alone(t):
    """As `einops.pack` has it."""
    return torch.cat([batch_first(t)])


def by_unbind(t):
    return torch.cat(t.unflatten(-1, (H, D)).unbind(2))


def by_einsum(t):
    return torch.einsum("bnhd->bhnd", t.view(B, N, H, D)).reshape(-1, N, D)


FOLDS = [batch_first, heads_first, tokens_first, by_stack, by_cat, by_cat_alone, by_unbind, by_einsum]


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


# ---- calls that name queries and keys


def looped(q, k, v, mask):
    return torch.stack([sdpa(q[:, h], k[:, h], v[:, h], mask[:, 0]) for h in range(q.size(1))], 1)


def looped_by_groups(q, k, v, mask):
    return torch.cat([sdpa(q[:, part], k[:, part], v[:, part], mask) for part in (slice(0, 1), slice(1, None))], 1)


def unbound(q, k, v, mask):
    return torch.stack([sdpa(*one, mask[:, 0]) for one in zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True)], 1)


def folded(q, k, v, mask):
    return sdpa(*(t.flatten(0, 1) for t in (q, k, v, mask.expand(*q.shape[:2], -1, -1)))).unflatten(0, q.shape[:2])


def folded_heads_first(q, k, v, mask):
    return folded(*(t.transpose(0, 1) for t in (q, k, v, mask.expand(*q.shape[:2], -1, -1)))).transpose(0, 1)


def heads_before_sequences(q, k, v, mask):
    return sdpa(*(t.transpose(0, 1) for t in (q, k, v, mask))).transpose(0, 1)


def sliced(q, k, v, mask):
    mask, heads = mask.expand(*q.shape[:2], -1, -1), q.size(1)
    whole = [t.flatten(0, 1) for t in (q, k, v, mask)]
    return torch.cat([sdpa(*one) for one in zip(*(t.split(2 * heads) for t in whole), strict=True)]).unflatten(
        0, q.shape[:2]
    )


def one_sequence_each(q, k, v, mask):
    return torch.stack([sdpa(q[i], k[i], v[i], mask[i]) for i in range(len(q))])


def of_five_dimensions(q, k, v, mask):
    return sdpa(*(t.unsqueeze(2) for t in (q, k, v, mask)))[:, :, 0]


CALLS = [looped, looped_by_groups, unbound, folded, folded_heads_first, of_five_dimensions]
ODD = [heads_before_sequences, sliced, one_sequence_each]  # where a mask does not name padding


@pytest.mark.parametrize(
    ("attend", "padded"), [(one, padded) for one in CALLS for padded in (False, True)] + [(one, False) for one in ODD]
)
def test_each_head_of_a_call_is_a_head_wherever_it_stands(attend, padded):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(12, 36)
            self.qkv.weight.data *= torch.arange(1.0, 4.0).repeat_interleave(4).repeat(3)[:, None]

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            self.q, self.k = q, k
            return attend(q, k, v, SEEN if padded else torch.ones_like(SEEN))

    model = Model()
    seen = record(model, torch.randn(3, 7, 12))
    right = per_head(logits_of(model.q, model.k, mask=SEEN if padded else None), ~SEEN[:, 0, 0] if padded else None)
    found = seen.heads["root"]
    assert_close(found, [{name: head[name] for name in ("entropy", "max_logit", "sink", "distance")} for head in right])


SEEN = (torch.arange(7) < torch.tensor([7, 7, 4])[:, None])[:, None, None].expand(3, 1, 7, 7)


def test_slices_across_heads_and_sequences_are_said():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(12, 36)

        def forward(self, x):
            parts = (t.unflatten(-1, (3, 4)).transpose(1, 2).flatten(0, 1).split(2) for t in self.qkv(x).chunk(3, -1))
            return torch.cat([sdpa(*one) for one in zip(*parts, strict=True)])

    seen = record(Model(), torch.randn(3, 7, 12))
    assert seen.heads == {}
    assert "the attention of root, whose heads pass `split`" in seen.uncovered


@pytest.mark.parametrize("use", ["one by one", "stacked"])
def test_heads_whose_softmax_is_taken_one_by_one(use):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(12, 36)

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            self.q, self.k = q, k
            weights = [one.softmax(-1) for one in (q @ k.mT / 2).unbind(1)]
            if use == "stacked":
                return torch.stack(weights, 1) @ v
            return [w @ one for w, one in zip(weights, v.unbind(1), strict=True)]

    model = Model()
    seen = record(model, torch.randn(3, 7, 12))
    assert_close(seen.heads["root"], per_head(logits_of(model.q, model.k)))
