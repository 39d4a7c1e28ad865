"""Caches whose slots are not positions: a distance is between true positions, or there is none."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.capture.attention.attends import HEADS, Attends, scores
from tests.capture.attention.harness import capture_of, hooked, record, recorded

X, SLOTS = torch.randn(2, 24, 16), 6
UNKNOWN = "distances in layer, where its queries stand is not known"


class Remembers(nn.Module):
    """Keeps keys and values as `keep(old, new, past)` has it, which works on positions alike.

    masked: whether the mask is given where it hides nothing, too.
    """

    def __init__(self, keep, fused: bool, masked: bool, full: bool) -> None:
        super().__init__()
        self.qkv, self.keep, self.fused, self.masked, self.past = nn.Linear(16, 48), keep, fused, masked, 0
        empty = torch.zeros(2, HEADS, SLOTS if full else 0, 8)
        self.cache, self.at = [empty, empty], torch.full((SLOTS if full else 0,), -1)
        self.p = self.far = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        q, *new = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        k, v = self.cache = [self.keep(old, each, self.past) for old, each in zip(self.cache, new, strict=True)]
        mine = torch.arange(self.past, self.past + x.size(1))
        self.at = self.keep(self.at[None, None, :, None], mine[None, None, :, None], self.past)[0, 0, :, 0]
        self.past += x.size(1)
        seen = (self.at >= 0) & (self.at <= mine[:, None])
        mask = seen if self.masked or not seen.all() else None
        logits = scores(q, k)
        weights = (logits if mask is None else logits.masked_fill(~mask, -math.inf)).softmax(-1)
        self.p, self.far = weights.detach(), (mine[:, None] - self.at).abs()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask) if self.fused else weights @ v


def mean_distances(model) -> list[float]:
    right: list[float] = (model.p.double() * model.far).sum(-1).mean((0, 2)).tolist()
    return right


def decoded(layer: Remembers, parts: list[int]) -> tuple[list[bool], list[str]]:
    """Of each pass, whether distances were written: those that are right."""
    model, written = nn.Sequential(), []
    model.add_module("layer", layer)
    capture = capture_of(model)
    with torch.no_grad(), hooked(model, capture):
        for part in X[:, : sum(parts)].split(parts, 1):
            model(part)
            found = [head.get("distance") for head in recorded(capture).heads["layer"]]
            written.append(None not in found)
            assert found == ([None] * HEADS if None in found else pytest.approx(mean_distances(layer), abs=1e-4))
    return written, list(capture.uncovered)


def at(new: Tensor, past: int) -> Tensor:
    return torch.arange(past, past + new.size(2)) % SLOTS


def by_cat(old, new, past):
    first = past % SLOTS
    return torch.cat((old[:, :, :first], new, old[:, :, first + new.size(2) :]), 2)


def by_index(old, new, past):
    return old.index_copy(2, at(new, past), new)


def by_assignment(old, new, past):
    kept = old.clone()
    kept[:, :, at(new, past)] = new
    return kept


def one_by_one(old, new, past):
    kept = old.clone()
    for i, slot in enumerate(at(new, past).tolist()):
        kept[:, :, slot] = new[:, :, i]
    return kept


def by_choice(old, new, past):
    hit = torch.zeros(SLOTS, 1, dtype=torch.bool).index_fill(0, at(new, past), True)
    return torch.where(hit, new.expand_as(old), old)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keep", [by_cat, by_index, by_assignment, one_by_one])
@pytest.mark.parametrize("each", [1, 2, 3])
def test_a_cache_that_goes_round_has_distances_while_no_older_key_is_seen_behind(each, keep, masked, fused):
    written, said = decoded(Remembers(keep, fused, masked, full=True), [each] * 8)
    assert written == [(i * each) % SLOTS + each == SLOTS or i * each < SLOTS for i in range(8)]
    assert said == [UNKNOWN]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("keep", [by_index, by_assignment, one_by_one])
@pytest.mark.parametrize("parts", [[4, 4, 4], [6, 4, 6], [3, 6, 6]])
def test_so_has_one_whose_end_is_within_a_chunk(parts, keep, fused):
    written, said = decoded(Remembers(keep, fused, True, full=True), parts)
    assert written[0]
    assert not all(written)
    assert said == [UNKNOWN]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_where_one_token_is_chosen_for_a_slot_it_is_not_known(masked, fused):
    written, _ = decoded(Remembers(by_choice, fused, masked, full=True), [1] * 8)
    assert not any(written)


def last_ones(old, new, past):
    return torch.cat((old, new), 2)[:, :, -SLOTS:]


def moved_on(old, new, past):
    return torch.cat((old[:, :, new.size(2) :], new), 2)


def newest_first(old, new, past):
    return torch.cat((new, old[:, :, : SLOTS - new.size(2)]), 2)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("keep", "full", "parts"),
    [(last_ones, False, [4, 1, 1, 1, 2, 1]), (moved_on, True, [4, 1, 1, 1, 2, 1]), (newest_first, True, [1] * 8)],
)
def test_a_sliding_window_keeps_its_distances(keep, full, parts, fused):
    written, said = decoded(Remembers(keep, fused, False, full), parts)
    assert all(written)
    assert not said


def after_sinks(old, new, past):
    kept = torch.cat((old, new), 2)
    return torch.cat((kept[:, :, :2], kept[:, :, 2:][:, :, 2 - SLOTS :]), 2) if kept.size(2) > SLOTS else kept


def before_it_grows(old, new, past):
    if (more := old.size(2) + new.size(2) - SLOTS) > 0:
        old = torch.cat((old[:, :, :2], old[:, :, 2 + more :]), 2)
    return torch.cat((old, new), 2)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("keep", [after_sinks, before_it_grows])
@pytest.mark.parametrize("parts", [[1] * 9, [4, 1, 1, 1, 1], [5, 3, 2]])
def test_a_window_behind_sinks_has_no_distances_once_tokens_are_dropped_between(parts, keep, fused):
    written, said = decoded(Remembers(keep, fused, False, full=False), parts)
    assert written == [sum(parts[: i + 1]) <= SLOTS for i in range(len(parts))]
    assert said == [UNKNOWN]


@pytest.mark.parametrize("fused", [False, True])
def test_a_causal_call_on_a_cache_of_fixed_length_keeps_its_distances(fused):
    class Prefill(Attends):
        def forward(self, x):
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            rooms = torch.zeros(2, HEADS, 30, 8), torch.zeros(2, HEADS, 30, 8)
            for room, new in zip(rooms, (k, v), strict=True):
                room[:, :, : x.size(1)] = new
            seen = torch.ones(x.size(1), 30, dtype=torch.bool).tril()
            weights = scores(q, rooms[0]).masked_fill(~seen, -math.inf).softmax(-1)
            self.p, self.far = weights.detach(), (torch.arange(24)[:, None] - torch.arange(30)).abs()
            return F.scaled_dot_product_attention(q, *rooms, is_causal=True) if fused else weights @ rooms[1]

    model = Prefill(None)
    found = [head["distance"] for head in record(model, X).heads["root"]]
    assert found == pytest.approx(mean_distances(model), abs=1e-4)


class Parts(Attends):
    """Attends from some tokens to some, in one pass."""

    def __init__(self, queries, keys, fused: bool) -> None:
        super().__init__(None)
        self.of, self.fused = (queries, keys), fused

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        q, k, v = (
            torch.cat([t[:, :, part] for part in of], 2) for t, of in zip((q, k, v), self.of + self.of[1:], strict=True)
        )
        mine, theirs = (torch.cat([torch.arange(x.size(1))[part] for part in of]) for of in self.of)
        weights = scores(q, k).softmax(-1)
        self.p, self.far = weights.detach(), (mine[:, None] - theirs).abs()
        return F.scaled_dot_product_attention(q, k, v) if self.fused else weights @ v


KNOWN = {
    "a window": ([slice(4, 8)], [slice(2, 10)]),
    "the last two": ([slice(18, 20)], [slice(0, 20)]),
    "some": ([slice(0, 2), slice(6, 9)], [slice(0, 20)]),
}
LEFT_OUT = {
    "a global token before a window": ([slice(4, 8)], [slice(0, 1), slice(2, 8)]),
    "global ones around": ([slice(6, 8)], [slice(0, 2), slice(4, 10), slice(12, 14)]),
    "what comes first": ([slice(4, 6)], [slice(6, 8), slice(0, 6)]),
    "the last of what is left": ([slice(8, 9)], [slice(0, 2), slice(6, 9)]),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("of", KNOWN.values(), ids=KNOWN.keys())
def test_parts_of_a_sequence_keep_their_distances(of, fused):
    model = Parts(*of, fused)
    assert [head["distance"] for head in record(model, X).heads["root"]] == pytest.approx(
        mean_distances(model), abs=1e-4
    )


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("of", LEFT_OUT.values(), ids=LEFT_OUT.keys())
def test_parts_with_gaps_between_have_none(of, fused):
    seen = record(Parts(*of, fused), X)
    assert all("distance" not in head for head in seen.heads["root"])
    assert list(seen.uncovered) == [UNKNOWN.replace("layer", "root")]


# ---- patches


def of_images(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, 16 * c)


PATCHES = {
    "images": (of_images, 48, torch.randn(2, 3, 16, 16)),
    "grey images": (of_images, 16, torch.randn(2, 1, 16, 16)),
    "series": (lambda x: x.unflatten(1, (12, 2)).flatten(2), 32, X),
    "a single series": (lambda x: x.unflatten(1, (10, 2)), 2, torch.randn(2, 20)),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("some", [slice(None), slice(-2, None), slice(2, 5), slice(4, 8)])
@pytest.mark.parametrize("kind", PATCHES)
def test_some_patches_stand_where_they_are(kind, some, fused):
    patches, width, x = PATCHES[kind]

    class Vision(Attends):
        def forward(self, x):
            x = self.embed(patches(x))
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            mine, q = torch.arange(k.size(2))[some], q[:, :, some]
            weights = scores(q, k).softmax(-1)
            self.p, self.far = weights.detach(), (mine[:, None] - torch.arange(k.size(2))).abs()
            return F.scaled_dot_product_attention(q, k, v) if fused else weights @ v

    model = Vision(None, embed=nn.Linear(width, 16))
    found = [head.get("distance") for head in record(model, x).heads["root"]]
    whole_rows = kind != "a single series" and (some.start is None or some.start in (-2, 4))
    if some == slice(None) or whole_rows:
        assert found == pytest.approx(mean_distances(model), abs=1e-4)
    else:
        assert found == [None] * HEADS or found == pytest.approx(mean_distances(model), abs=1e-4)
