"""Whatever passes can be loaded with `weights_only=True`; whatever does not is named."""

from __future__ import annotations

import io
import random
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from enum import Enum

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchprobe.checkpoint.files import plain
from torchprobe.random_state import random_states, set_random_states


def through_a_file(value):
    file = io.BytesIO()
    torch.save(plain(value, "x"), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


Point = namedtuple("Point", "x y")
NUMPY = [np.float32(0.5), np.int64(-3), np.bool_(True), np.float64("inf")]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (NUMPY, [0.5, -3, True, float("inf")]),
        (Point(1, (2, None)), (1, (2, None))),
        (defaultdict(list, {"a": [1]}), {"a": [1]}),
        (Counter({30: 1}), Counter({30: 1})),
        ({1: {"lr": 0.1, "betas": (0.9, 0.999)}, "s": {1, 2}}, {1: {"lr": 0.1, "betas": (0.9, 0.999)}, "s": {1, 2}}),
        (torch.bfloat16, torch.bfloat16),
        (b"bytes", b"bytes"),
    ],
)
def test_plain_values_come_back(value, expected):
    found = through_a_file(value)
    assert found == expected
    assert type(found) is type(expected)


def test_arrays_and_tensors_come_back_as_tensors():
    found = through_a_file({"a": np.arange(6.0)[::2], "p": nn.Parameter(torch.ones(2)), "t": torch.zeros(1)})
    assert found["a"].tolist() == [0.0, 2.0, 4.0]
    assert isinstance(found["p"], nn.Parameter)


def test_a_state_dict_keeps_its_versions():
    state = nn.BatchNorm1d(3).state_dict()
    found = through_a_file(state)
    assert type(found) is OrderedDict
    assert found._metadata == state._metadata


class Colour(Enum):
    RED = 1


@pytest.mark.parametrize("value", [object(), deque([1]), Colour.RED, lambda: 0, np.array(["a"]), torch.Generator()])
def test_what_would_not_load_is_named(value):
    with pytest.raises(TypeError, match=rf"x\['a'\]\[1\] is a {type(value).__name__}, which torch.load"):
        plain({"a": [0, value]}, "x")


nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children) | st.tuples(children, children),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(nested)
def test_any_nest_of_plain_values_is_unchanged(value):
    assert plain(value, "x") == value
    assert through_a_file(value) == value


def test_random_states_go_through_a_file():
    def draw():
        return random.random(), random.gauss(0, 1), np.random.normal(), torch.rand(2).tolist()

    random.gauss(0, 1)  # Python and numpy keep the second of a pair
    np.random.normal()
    states = through_a_file(random_states())
    first = draw()
    draw()
    set_random_states(states)
    assert draw() == first


def test_devices_that_this_machine_lacks_are_left_out_with_a_warning(caplog):
    states = random_states()
    states["devices"] = {"cuda": [torch.get_rng_state()] * 99, "mps": [], "npu": [torch.get_rng_state()]}
    if torch.backends.mps.is_available():
        states["devices"].pop("mps")
    set_random_states(states)
    assert "the random state of 99 cuda devices is not restored" in caplog.text
    assert "npu" in caplog.text
