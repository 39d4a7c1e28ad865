"""Closures, subclasses, steps inside steps, and steps that raise."""

from __future__ import annotations

import pytest
import torch

import torchprobe
from tests.setups.loops import TOTAL, loss_of, net, sgd, steps, train_step, values
from tests.setups.reference import gradients, l2, parameters
from torchprobe.testing import MemoryWriter


def closure_for(model, optimizer, seen, seed=0):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, seed)
        loss.backward()
        seen.append(gradients(model))
        return loss

    return closure


def test_sgd_with_a_closure():
    model, writer, seen = net(), MemoryWriter(), []
    optimizer = sgd(model)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(3):
            optimizer.step(closure_for(model, optimizer, seen, k))
        assert session.step == 3
    assert writer.scalars(TOTAL) == [(k + 1, pytest.approx(l2(*g.values()))) for k, g in enumerate(seen)]
    assert steps(writer, "activation_mean/0") == steps(writer, "update_ratio/0.weight") == [1, 2, 3]


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_counts_a_step_for_all_its_evaluations_and_none_as_skipped(search):
    model, writer, last = net(), MemoryWriter(), []
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, lr=0.1, line_search_fn=search)
    with torchprobe.instrument(model, writer=writer, every=1, flush_every=1) as session:
        for k in range(3):
            seen: list[dict[str, torch.Tensor]] = []
            optimizer.step(closure_for(model, optimizer, seen, k))
            assert len(seen) > 1
            last.append(l2(*seen[-1].values()))
        assert session.step == 3
    assert writer.scalars(TOTAL) == [(k + 1, pytest.approx(norm)) for k, norm in enumerate(last)]
    assert steps(writer, "activation_mean/0") == steps(writer, "update_ratio/0.weight") == [1, 2, 3]
    assert values(writer, "overview/skipped_steps")[-1] == 0


class Parent(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        return super().step(closure)


class Child(Parent):
    def step(self, closure=None):
        return super().step(closure)


def test_a_step_that_calls_the_steps_of_its_parent_classes_is_one_step():
    model, writer = net(), MemoryWriter()
    for parent in (torch.optim.SGD, Parent):
        parent(model.parameters(), lr=0.1)  # making one is what hooks its class
    optimizer = Child(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        expected = [train_step(model, optimizer, k) for k in range(3)]
        assert session.step == 3
    assert values(writer, TOTAL) == pytest.approx(expected)


class Decayed(torch.optim.SGD):
    def step(self, closure=None):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.mul_(0.5)
        return super().step(closure)


def test_an_update_is_also_what_a_step_does_before_it_calls_that_of_its_parent_class():
    model, writer = net(), MemoryWriter()
    torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = Decayed(model.parameters(), lr=0.01)
    moved = []
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(3):
            before = parameters(model)["0.weight"]
            train_step(model, optimizer, k)
            moved.append(l2(parameters(model)["0.weight"] - before) / l2(before))
    assert values(writer, "update_ratio/0.weight") == pytest.approx(moved)


class Lookahead(torch.optim.Optimizer):
    """Steps another optimizer over the same parameters, then pulls the weights back half way."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__([p for group in inner.param_groups for p in group["params"]], {"lr": 0.5})
        self.inner = inner

    def step(self, closure=None):
        slow = [p.detach().clone() for p in self.param_groups[0]["params"]]
        self.inner.step()
        with torch.no_grad():
            for p, old in zip(self.param_groups[0]["params"], slow, strict=True):
                p.lerp_(old, 0.5)


def test_an_optimizer_inside_another_ones_step_is_part_of_that_step():
    model, writer = net(), MemoryWriter()
    optimizer = Lookahead(sgd(model, lr=0.2))
    expected, ratios = [], []
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k in range(3):
            before = parameters(model)["0.weight"]
            expected.append(train_step(model, optimizer, k))
            ratios.append(l2(parameters(model)["0.weight"] - before) / l2(before))
            assert session.step == k + 1
    assert values(writer, TOTAL) == pytest.approx(expected)
    assert values(writer, "update_ratio/0.weight") == pytest.approx(ratios, rel=1e-5)


class Fails(torch.optim.SGD):
    """Raises in the middle of a step when told to."""

    fail = False

    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        if self.fail:
            raise torch.OutOfMemoryError("out of memory")
        return super().step()


@pytest.mark.parametrize("with_closure", [False, True], ids=["plain", "closure"])
def test_a_step_that_raises_is_no_step_and_the_next_ones_are_right(with_closure):
    model, writer = net(), MemoryWriter()
    optimizer = Fails(model.parameters(), lr=0.1)
    expected = []
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        for k, fails in enumerate((False, True, True, False, False)):
            seen: list[dict[str, torch.Tensor]] = []
            closure = closure_for(model, optimizer, seen, k)
            optimizer.fail = fails
            if not with_closure:
                closure()
            try:
                optimizer.step(closure if with_closure else None)
            except torch.OutOfMemoryError:
                continue
            expected.append(l2(*seen[-1].values()))
        assert session.step == 3
    assert writer.scalars(TOTAL) == [(k + 1, pytest.approx(norm)) for k, norm in enumerate(expected)]
    assert steps(writer, "update_ratio/0.weight") == [1, 2, 3]


def test_the_same_batch_tried_again_after_a_step_that_raised():
    model, writer = net(), MemoryWriter()
    optimizer = Fails(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        loss_of(model).backward()
        expected = l2(*gradients(model).values())
        optimizer.fail = True
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
        optimizer.fail = False
        optimizer.step()
        assert session.step == 1
    assert writer.scalars(TOTAL) == [(1, pytest.approx(expected))]
