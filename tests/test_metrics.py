"""What a user logs becomes tags with numbers, or is refused by name."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch

import torchprobe
from torchprobe.testing import MemoryWriter
from torchprobe.user_values import Metrics


def tagged(metrics, prefix=""):
    return dict(Metrics().tagged(metrics, prefix))


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (2, 2.0),
        (True, 1.0),
        (0.5, 0.5),
        (Fraction(1, 4), 0.25),
        (np.float32(1.5), 1.5),
        (np.float64(1.5), 1.5),
        (np.longdouble(1.5), 1.5),
        (np.int64(-3), -3.0),
        (np.bool_(True), 1.0),
        (np.array(2.5), 2.5),
        (np.array([2.5]), 2.5),
        (np.array([[7]], dtype=np.uint8), 7.0),
        (10**400, math.inf),
        (-(10**400), -math.inf),
        (math.inf, math.inf),
    ],
)
def test_every_kind_of_host_number_becomes_a_float(value, number):
    logged = tagged({"loss": value})
    assert logged == {"loss": number}
    assert type(logged["loss"]) is float


def test_nan_stays_nan():
    assert math.isnan(tagged({"loss": math.nan})["loss"])


def test_the_prefix_comes_before_the_name():
    assert tagged({"loss": 1.0, "top5/acc": 2.0}, "train") == {"train/loss": 1.0, "train/top5/acc": 2.0}


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(3.0),
        torch.tensor([[3.0]], dtype=torch.bfloat16),
        torch.tensor([3]),
        torch.nn.Parameter(torch.tensor(3.0)),
        torch.tensor(1.5, requires_grad=True) * 2,
    ],
)
def test_a_tensor_of_one_element_stays_on_its_device_without_a_graph(value):
    logged = tagged({"loss": value})["loss"]
    assert logged.shape == ()
    assert logged.dtype == value.dtype
    assert not logged.requires_grad
    assert logged == 3


def test_a_tensor_is_logged_as_it_is_now():
    running = torch.tensor(1.0)
    logged = tagged({"running": running})["running"]
    running += 1
    assert logged == 1


def test_no_host_read_of_a_tensor():
    class Unreadable(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            assert func.__name__ not in ("item", "cpu", "__bool__", "__float__", "tolist", "numpy")
            return super().__torch_function__(func, types, args, kwargs or {})

    assert list(tagged({"loss": torch.tensor(2.0).as_subclass(Unreadable)})) == ["loss"]


class Distributed(torch.Tensor):
    """Has the mark of a DTensor."""

    def full_tensor(self):
        raise AssertionError("a collective that the user did not ask for")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(3), r"Tensor of shape \(3,\), type torch.float32"),
        (torch.empty(0), r"shape \(0,\)"),
        (torch.tensor(1j), "torch.complex64"),
        (torch.tensor([2.0]).to_sparse(), "torch.float32"),
        (torch.tensor(2.0, device="meta"), "torch.float32"),
        (torch.tensor(1.0).as_subclass(Distributed), r"Distributed .*full_tensor\(\)"),
        (np.ones((2, 2)), r"ndarray of shape \(2, 2\)"),
        (np.array(["a"]), "type <U1"),
        (np.array(1j), "complex128"),
        (np.array([None]), "object"),
    ],
)
def test_what_is_no_single_real_number_is_dropped_with_one_warning_a_tag(value, words, caplog):
    metrics = Metrics()
    for _ in range(3):
        assert dict(metrics.tagged({"bad": value, "good": 1.0}, "train")) == {"train/good": 1.0}
    (warning,) = caplog.messages
    assert re.search(f"^metric train/bad is dropped.*{words}", warning)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_tensor_which_has_no_shape_is_dropped(caplog):
    assert tagged({"bad": torch.nested.nested_tensor([torch.ones(1)]), "good": 1.0}) == {"good": 1.0}
    assert "shape nested" in caplog.text


@pytest.mark.parametrize("value", ["0.5", None, [1.0], 1j, np.complex64(1j), np.str_("1"), object()])
def test_what_is_no_number_is_refused_before_anything_is_logged(value):
    logged = []
    with pytest.raises(TypeError, match=r"^metrics\['bad'\]=.*takes a number, a numpy scalar or a one-element tensor"):
        logged.extend(Metrics().tagged({"good": 1.0, "bad": value}, ""))
    assert logged == []


@pytest.mark.parametrize(
    ("metrics", "prefix", "words"),
    [
        ([("loss", 1.0)], "", r"^metrics=\[.*takes a mapping of names to numbers"),
        ({3: 1.0}, "", "^metrics key=3: takes a string, not int"),
        ({"loss": 1.0}, None, "^prefix=None: takes a string, not NoneType"),
    ],
)
def test_arguments_of_a_wrong_kind_are_refused_by_name(metrics, prefix, words):
    with pytest.raises(TypeError, match=words):
        list(Metrics().tagged(metrics, prefix))


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("number", [float, torch.tensor], ids=["host", "tensor"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_torchprobe_writes_itself_is_not_the_users(when, number, every, caplog):
    """At no step, sampled or not: the user's numbers under such a tag are left out, which is said once a tag."""
    model, writers = torch.nn.Linear(3, 2), [MemoryWriter(), MemoryWriter()]
    tags = ("overview/loss", "overview/grad_norm", "param_norm/weight", "lr/SGD/group_0", "overview/skipped_steps")
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for writer in writers:
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torchprobe.instrument(model, writer=writer, every=every) as session:
            for step in range(1, 5):
                optimizer.zero_grad()
                model(torch.ones(4, 3)).square().mean().backward()
                if when == "after":
                    optimizer.step()
                if writer is writers[1]:
                    session.log_metrics({tag: number(77.0) for tag in tags} | {"overview/mine": number(1.0 * step)})
                    session.log_metrics({"performance/step_seconds": number(1e6)})
                if when == "before":
                    optimizer.step()
    bare, both = writers
    for tag in tags:
        assert both.scalars(tag) == bare.scalars(tag) != []
        assert sum(f"'{tag}' of what was logged is left out" in line for line in caplog.messages) == 1
    assert max(value for _, value in both.scalars("performance/step_seconds")) < 1e6
    assert both.scalars("overview/mine") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
