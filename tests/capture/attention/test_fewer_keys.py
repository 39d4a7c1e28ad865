"""Keys that were picked among the queries' tokens, or made of several of these: no distance, and it is said."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.capture.attention.attends import HEADS, scores
from tests.capture.attention.harness import record
from tests.capture.attention.reference import assert_close, of_weights


def masked(c: Tensor) -> Tensor:
    kept = torch.zeros(c.shape[:2]).scatter(1, torch.rand(c.shape[:2]).topk(2, -1).indices, 1).bool()
    return c[kept].view(len(c), 2, -1)


def selected(c: Tensor) -> Tensor:
    kept = torch.arange(c.size(1)) % 2 == 0
    return torch.masked_select(c, kept[None, :, None]).view(len(c), -1, c.size(-1))


def gathered(c: Tensor) -> Tensor:
    return c.gather(1, c.norm(dim=-1).topk(2, -1).indices[..., None].expand(-1, -1, c.size(-1)))


def indexed(c: Tensor) -> Tensor:
    return c[:, torch.tensor([0, 2])]


def of_a_row(c: Tensor) -> Tensor:
    return c[torch.arange(len(c))[:, None], c.norm(dim=-1).topk(2, -1).indices]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("pick", [masked, selected, gathered, indexed, of_a_row])
@pytest.mark.parametrize("of_others", [False, True])
def test_keys_that_were_picked_before_the_queries_own_are_not_side_by_side(pick, fused, of_others):
    """As where a part of what came before is dropped; what was picked of another sequence stands where it is put."""

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv = nn.Linear(16, 16), nn.Linear(16, 32)

        def forward(self, x, other):
            before, x = (other, x) if of_others else (x[:, :4], x[:, 4:])
            k, v = self.kv(torch.cat((pick(before), x), 1)).chunk(2, -1)
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (self.q(x), k, v))
            self.p = scores(q, k).softmax(-1)
            return F.scaled_dot_product_attention(q, k, v) if fused else self.p @ v

    model = Keeps()
    seen = record(model, torch.randn(2, 12, 16), torch.randn(2, 4, 16))
    right = of_weights(model.p, position=torch.arange(model.p.size(2)) + 2)
    if not of_others:
        assert list(seen.uncovered) == ["distances in root, where its queries stand is not known"]
        right = [{name: value for name, value in head.items() if name != "distance"} for head in right]
    assert_close(seen.heads["root"], right)
    assert all(("distance" in head) == of_others for head in seen.heads["root"])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("pool", [nn.Conv1d(16, 16, 2, 2), nn.AvgPool1d(2), nn.MaxPool1d(2)])
def test_keys_that_were_made_of_several_tokens_each_stand_where_it_is_not_known(pool, alike, fused):
    """As where keys are fewer than queries by a convolution; where both are as many, these are the tokens."""

    class Reduced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv, self.pool = nn.Linear(16, 16), nn.Linear(16, 32), copy.deepcopy(pool)

        def forward(self, x):
            fewer = self.pool(x.mT).mT
            k, v = self.kv(fewer).chunk(2, -1)
            q = self.q(self.pool(x.mT).mT if alike else x)
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
            self.p = scores(q, k).softmax(-1)
            return F.scaled_dot_product_attention(q, k, v) if fused else self.p @ v

    model = Reduced()
    seen = record(model, torch.randn(2, 12, 16))
    right = of_weights(model.p)
    if not alike:
        assert list(seen.uncovered) == ["distances in root, where its queries stand is not known"]
        right = [{name: value for name, value in head.items() if name != "distance"} for head in right]
    assert_close(seen.heads["root"], right)
    assert all(("distance" in head) == alike for head in seen.heads["root"])
