"""Where it is not known how far queries are from keys of the same sequence, no distance is written, and it is said."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.capture.attention.attends import HEADS, Attends, scores
from tests.capture.attention.harness import record
from tests.capture.attention.reference import assert_close, of_weights

X = torch.randn(2, 12, 16)
SOME = torch.tensor([7, 2, 9, 4])


class Moved(Attends):
    """Attends among queries, keys and values that a function moves."""

    def __init__(self, move, fused: bool = False) -> None:
        super().__init__(None)
        self.move, self.fused = move, fused

    def forward(self, x):
        q, k, v = self.move(*(t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)))
        weights = scores(q, k).softmax(-1)
        self.p = weights.detach()
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v)
        return weights @ v


def shifted(t: Tensor) -> Tensor:
    return F.pad(t, (0, 0, 0, 0, 1, 0))[:, :, :-1]


def looking_back(q, k, v):
    q, k, v = (t.unflatten(2, (4, 3)) for t in (q, k, v))
    return q, torch.cat((shifted(k), k), 3), torch.cat((shifted(v), v), 3)


def of_the_block_before(q, k, v):
    q, k, v = (t.unflatten(2, (4, 3)) for t in (q, k, v))
    return q, k.roll(1, 2), v.roll(1, 2)


def copied_into_a_part(q, k, v):
    rooms = torch.zeros(2, HEADS, 16, 8), torch.zeros(2, HEADS, 16, 8)
    rooms[0].narrow(2, 2, 12).copy_(k)
    rooms[1].narrow(2, 2, 12).copy_(v)
    return q, *rooms


def scattered(q, k, v):
    places = torch.arange(2, 14)[:, None].expand(2, HEADS, -1, 8)
    return q, *(torch.zeros(2, HEADS, 16, 8).scatter(2, places, t) for t in (k, v))


MOVED = {
    "queries by index": lambda q, k, v: (q[:, :, SOME], k, v),
    "queries selected": lambda q, k, v: (q.index_select(2, SOME), k, v),
    "queries of rank": lambda q, k, v: (q.sort(2).values[:, :, :5], k, v),
    "keys by index": lambda q, k, v: (q, k[:, :, SOME], v[:, :, SOME]),
    "every second key": lambda q, k, v: (q, k[:, :, ::2], v[:, :, ::2]),
    "keys beside": lambda q, k, v: (q, F.pad(k, (0, 0, 1, 0))[:, :, :-1] + k, v),
    "one query": lambda q, k, v: (q[:, :, SOME[:1]], k, v),
    **{f.__name__: f for f in (copied_into_a_part, scattered)},
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("move", MOVED.values(), ids=MOVED.keys())
def test_no_distance_is_written_but_all_else(move, fused):
    model = nn.Sequential()
    model.add_module("layer", Moved(move, fused))
    seen = record(model, X)
    heads = of_weights(model.layer.p)
    assert_close(seen.heads["layer"], [{k: v for k, v in head.items() if k != "distance"} for head in heads])
    assert all("distance" not in head for head in seen.heads["layer"])
    assert list(seen.uncovered) == ["distances in layer, where its queries stand is not known"]


@pytest.mark.parametrize("move", [looking_back, of_the_block_before])
def test_nor_where_blocks_look_at_others(move):
    assert all("distance" not in head for head in record(Moved(move), X).heads["root"])


KNOWN = {
    "the first over the rest": (lambda q, k, v: (q[:, :, :1], k[:, :, 1:], v[:, :, 1:]), [-1]),
    "later ones over the first": (lambda q, k, v: (q[:, :, 8:], k[:, :, :8], v[:, :, :8]), [8, 9, 10, 11]),
    "blocks": (lambda q, k, v: tuple(t.unflatten(2, (4, 3)).flatten(0, 1) for t in (q, k, v)), [0, 1, 2]),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("move", "position"), KNOWN.values(), ids=KNOWN.keys())
def test_what_is_known_is_written(move, position, fused):
    model = Moved(move, fused)
    found, p = record(model, X).heads["root"], model.p
    p = p.unflatten(0, (2, -1)).transpose(1, 2).flatten(0, 1)[:, None] if p.dim() == 4 and len(p) > 2 else p
    if len(model.p) == 2:
        assert_close(found, of_weights(p, position=torch.tensor(position)))
    else:
        assert all("distance" in head for head in found)


WINDOW = torch.arange(12)[:, None] + torch.arange(-1, 2)


def by_index(t):
    return t[:, :, WINDOW.clamp(0, 11)]


def by_flat_index(t):
    return t.index_select(2, WINDOW.clamp(0, 11).flatten()).unflatten(2, (12, 3))


def by_columns(t):
    return F.unfold(t.mT.reshape(-1, 8, 1, 12), (1, 3), padding=(0, 1)).view(2, HEADS, 8, 3, 12).permute(0, 1, 4, 3, 2)


@pytest.mark.parametrize("windows", [by_index, by_flat_index, by_columns])
def test_windows_that_are_picked_for_each_query_are_said(windows):
    class Windows(Attends):
        def forward(self, x):
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            weights = torch.einsum("bhnd,bhnwd->bhnw", q, windows(k)).softmax(-1)
            return torch.einsum("bhnw,bhnwd->bhnd", weights, windows(v))

    seen = record(Windows(None), X)
    assert seen.heads == {}
    assert list(seen.uncovered) == ["the attention of root, over a window of keys for each query"]


def test_a_query_of_a_sequence_each_is_no_window():
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, asked, x):
            self.p = torch.einsum("bd,bnd->bn", self.q(asked), self.k(x)).softmax(-1)
            return torch.einsum("bn,bnd->bd", self.p, x)

    model = Pool()
    assert_close(record(model, X[:, 0], X).heads["root"], of_weights(model.p[:, None, None]))


def test_a_single_token_keeps_its_heads_and_its_place():
    """Decoding with keys that heads share, joined of two parts each."""

    class Decoding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(16, HEADS * 8), nn.ModuleList([nn.Linear(16, 4), nn.Linear(16, 4)])
            self.past = None

        def forward(self, x):
            k = torch.cat([f(x) for f in self.k], -1)
            k = self.past = k if self.past is None else torch.cat((self.past, k), 1)
            q = torch.cat(self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2).chunk(2, -1)[::-1], -1)
            self.p = torch.einsum("bhnd,bmd->bhnm", q, k).softmax(-1)
            return torch.einsum("bhnm,bmd->bhnd", self.p, k)

    model = Decoding()
    with torch.no_grad():
        model(X[:, :7])
    assert_close(record(model, X[:, 7:8]).heads["root"], of_weights(model.p, position=torch.tensor([7])))


class Decoder(nn.Module):
    """Asks once at each step, by the state that a recurrent cell has then."""

    def __init__(self, asks) -> None:
        super().__init__()
        self.cell, self.asks = nn.GRUCell(16, 16), asks

    def forward(self, x):
        state, read = x.mean(1), []
        for _ in range(3):
            read.append(self.asks(state, x))
            state = self.cell(read[-1], state)
        return torch.stack(read)


def luong(state, x):
    return torch.bmm(torch.bmm(x, state[:, :, None]).softmax(1).mT, x)[:, 0]


def fused(state, x):
    return F.scaled_dot_product_attention(state[:, None, None], x[:, None], x[:, None])[:, 0, 0]


@pytest.mark.parametrize("asks", [luong, fused])
def test_steps_of_a_decoder_stand_where_it_is_not_known(asks):
    seen = record(Decoder(asks), X)
    assert all("entropy" in head and "distance" not in head for head in seen.heads["root"])
    assert list(seen.uncovered) == ["distances in root, where its queries stand is not known"]


def test_a_query_that_heads_share_stands_where_it_stood():
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(16, 16)

        def forward(self, asked, x):
            parts = zip(self.q(asked).chunk(HEADS, -1), x.chunk(HEADS, -1), strict=True)
            self.p = [(q @ k.mT).softmax(-1) for q, k in parts]
            return torch.cat([p @ k for p, k in zip(self.p, x.chunk(HEADS, -1), strict=True)], -1)

    model = Heads()
    (found,) = record(model, X[:, :1].clone(), X).heads["root"]
    right = of_weights(torch.cat(model.p)[:, None])[0]
    assert found["distance"] == pytest.approx(right["distance"], rel=1e-4)


class OneByOne(Attends):
    """A token at each step, with the keys of those before; made by the step before, where it feeds itself."""

    def __init__(self, feeds: bool, fused: bool) -> None:
        super().__init__(None)
        self.feeds, self.fused = feeds, fused

    def forward(self, x):
        token, past, self.p = x[:, :1], None, torch.zeros(2, HEADS, 6, 6)
        for i in range(6):
            q, *new = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(token).chunk(3, -1))
            k, v = past = new if past is None else [torch.cat(pair, 2) for pair in zip(past, new, strict=True)]
            self.p[:, :, i : i + 1, : i + 1] = scores(q, k).softmax(-1).detach()
            read = F.scaled_dot_product_attention(q, k, v) if self.fused else scores(q, k).softmax(-1) @ v
            token = read.transpose(1, 2).flatten(2) if self.feeds else x[:, i + 1 : i + 2]
        return token


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("feeds", [False, True])
def test_tokens_one_by_one_are_one_attention_of_as_many_heads(feeds, fused):
    model = OneByOne(feeds, fused)
    seen = record(model, X)
    right = of_weights(model.p, seen=torch.ones(6, 6).tril().bool())
    assert list(seen.heads) == ["root"]
    if feeds:  # which of the keys is its own, is not told
        assert all("distance" not in head for head in seen.heads["root"])
        right = [{name: value for name, value in head.items() if name != "distance"} for head in right]
    assert_close(seen.heads["root"], right)


def test_a_sequence_that_grows_by_what_it_reads_attends_to_itself():
    class Grows(Attends):
        def forward(self, x):
            for _ in range(3):
                x = torch.cat((x, super().forward(x)[:, -1:]), 1)
            return x

    seen = record(Grows(lambda m, q, k: scores(q, k).softmax(-1)), X[:, :1])
    assert list(seen.heads) == ["root"]
    assert seen.heads["root"][0]["rows"] == 2 * (1 + 2 + 3)
