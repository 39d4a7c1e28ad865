"""Views are decoded from strides: what a label says of an index is what stands there."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchprobe.capture.attention.labels import Memory, fresh, in_order, viewed
from torchprobe.capture.attention.places import coordinates

SHAPE = (4, 6, 8)


def memory(x: torch.Tensor) -> Memory:
    return Memory(tuple(x.shape), x.stride(), x.storage_offset())


def values(label, shape, strides) -> np.ndarray:
    """The number at each index, from what the roots count there; strides: of each root in that number."""
    total = np.zeros(shape, dtype=np.int64)
    for axis, dim in enumerate(label.dims):
        along = [1] * len(shape)
        along[axis] = shape[axis]
        for root, value in coordinates(dim, label.at).items():
            total = total + ((value - label.at.get(root, 0)) * strides[root]).reshape(along)
    return total + sum(value * strides[root] for root, value in label.at.items())


@st.composite
def steps(draw, x: torch.Tensor):
    """Some views of a tensor, one after the other."""
    views = [x]
    for _ in range(draw(st.integers(1, 6))):
        x = views[-1]
        kind = draw(st.sampled_from(["permute", "slice", "select", "unflatten", "flatten", "unsqueeze", "unfold"]))
        axis = draw(st.integers(0, x.dim() - 1)) if x.dim() else 0
        if kind == "permute":
            x = x.permute(draw(st.permutations(range(x.dim()))))
        elif kind == "slice" and x.dim():
            start = draw(st.integers(0, x.size(axis) - 1))
            x = x.narrow(axis, start, draw(st.integers(1, x.size(axis) - start)))
        elif kind == "select" and x.dim() > 1:
            x = x.select(axis, draw(st.integers(0, x.size(axis) - 1)))
        elif kind == "unflatten" and x.dim() and x.size(axis) % 2 == 0:
            x = x.unflatten(axis, (2, -1))
        elif kind == "flatten" and x.dim() > 1 and x.is_contiguous():
            x = x.view(x.size(0) * x.size(1), *x.shape[2:])
        elif kind == "unsqueeze":
            x = x.unsqueeze(axis)
        elif kind == "unfold" and x.dim() and x.size(axis) > 2:
            x = x.unfold(axis, 2, 1)
        views.append(x)
    return views


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_what_a_label_says_is_there(data):
    x = torch.arange(math.prod(SHAPE)).view(SHAPE)
    label = fresh(SHAPE)
    strides = {dim[0].root: stride for dim, stride in zip(label.dims, x.stride(), strict=True)}
    views = data.draw(steps(x))
    for before, after in pairwise(views):
        found = viewed(label, memory(before), memory(after))
        if found is None:  # not one of whole digits: then nothing is said
            return
        label = found
        assert np.array_equal(values(label, tuple(after.shape), strides), after.numpy())


def test_a_reshape_that_copies_goes_by_the_order_of_elements():
    x = torch.arange(24).view(2, 3, 4)
    label = fresh((2, 3, 4))
    strides = {dim[0].root: stride for dim, stride in zip(label.dims, x.stride(), strict=True)}
    turned = viewed(label, memory(x), memory(x.transpose(0, 1)))
    folded = viewed(turned, in_order((3, 2, 4)), in_order((6, 4)))
    assert np.array_equal(values(folded, (6, 4), strides), x.transpose(0, 1).reshape(6, 4).numpy())


@pytest.mark.parametrize(("start", "length"), [(1, 3), (2, 5)])
def test_a_part_that_crosses_a_digit_is_not_said_to_be_one(start, length):
    """Two digits that do not lie behind one another in one root, three values each."""
    label = fresh((2, 3))
    swapped = viewed(viewed(label, in_order((2, 3)), Memory((3, 2), (1, 3), 0)), in_order((3, 2)), in_order((6,)))
    found = viewed(swapped, in_order((6,)), Memory((length,), (1,), start)) if start + length <= 6 else None
    assert found is None
