"""Padded positions are told from masks, and from nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.capture.attention.reference import causal
from torchprobe.capture.attention.layout import padded_queries

LENGTH = 40


def real_positions(first: int, last: int) -> torch.Tensor:
    positions = torch.arange(LENGTH)
    return torch.stack([positions >= 0, (positions >= first) & (positions < last)])


def window(width: int) -> torch.Tensor:
    offset = torch.arange(LENGTH) - torch.arange(LENGTH)[:, None]
    return offset.abs() < width


@settings(max_examples=60, deadline=None)
@given(
    side=st.sampled_from(["left", "right"]),
    count=st.integers(0, LENGTH - 1),
    shape=st.sampled_from(["all", "causal", "window", "causal window"]),
    form=st.sampled_from(["rows masked too", "rows see what others see", "rows see everything"]),
    value=st.sampled_from([None, -torch.inf, torch.finfo(torch.float32).min, -1e4]),
)
def test_padding_is_recognised_on_either_side(side, count, shape, form, value):
    real = real_positions(count, LENGTH) if side == "left" else real_positions(0, LENGTH - count)
    visible = real[:, None, :].expand(2, LENGTH, LENGTH).clone()
    if "causal" in shape:
        visible &= causal(LENGTH, LENGTH)
    if "window" in shape:
        visible &= window(7)
    if form == "rows masked too":
        visible &= real[:, :, None]
    elif form == "rows see everything":
        visible |= ~real[:, :, None]
        if side == "right" and count:
            return  # the last query then sees all keys: nobody masks like this
    mask = visible if value is None else torch.zeros(visible.shape).masked_fill(~visible, value)
    assert torch.equal(padded_queries(mask[:, None], 2, LENGTH), ~real)


@pytest.mark.parametrize(
    "visible",
    [
        torch.ones(LENGTH, LENGTH, dtype=torch.bool),
        causal(LENGTH, LENGTH),
        window(5),
        window(5) & causal(LENGTH, LENGTH),
        window(5) | (torch.arange(LENGTH) < 2) | (torch.arange(LENGTH) < 2)[:, None],
        torch.arange(LENGTH)[:, None] // 10 == torch.arange(LENGTH) // 10,
        torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) > 0.5,
        causal(LENGTH, LENGTH) | (torch.arange(LENGTH) < 12),
    ],
    ids=["full", "causal", "window", "causal window", "global tokens", "packed", "random", "prefix"],
)
def test_masks_without_padding_hide_no_query(visible):
    assert not padded_queries(visible, 3, LENGTH).any()
    assert padded_queries(visible, 3, LENGTH).shape == (3, LENGTH)


def test_a_bias_is_no_mask():
    distance = (torch.arange(LENGTH) - torch.arange(LENGTH)[:, None]).abs()
    assert not padded_queries(-8.0 * distance, 1, LENGTH).any()


def test_a_single_position():
    assert padded_queries(torch.ones(1, 1, 1, 1, dtype=torch.bool), 2, 1).tolist() == [[False], [False]]
