"""Which calls of a module are of one place in its code: a loop's are, however it is written, two loops' are not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.capture.attention.harness import record

ROUNDS = 12
"""Calls of a loop: Python replaces instructions by faster ones, in which callers stand elsewhere, after some."""


def attend(x):
    return F.scaled_dot_product_attention(x, x, x)


class Reached:
    """Attention of a tensor, by whatever an object's user may write."""

    def __init__(self, x):
        self.x = x

    def __getitem__(self, index):
        return attend(self.x)

    def __iter__(self):
        yield attend(self.x)

    @property
    def value(self):
        return attend(self.x)


class Reads(Reached):
    def __getattribute__(self, name):
        return attend(object.__getattribute__(self, "x"))


class Makes:
    def __init__(self, x):
        self.out = attend(x)


def passed_on(parts):
    yield from (attend(part) for part in parts)


LOOPS = {
    "comprehension": lambda x: [attend(x) for _ in range(ROUNDS)],
    "nested": lambda x: [one for part in [[attend(x) for _ in range(ROUNDS)] for _ in range(2)] for one in part],
    "generator": lambda x: [one for one in (attend(x) for _ in range(ROUNDS))],  # noqa: C416
    "comprehension in a generator": lambda x: [torch.stack(a) for a in ([attend(x)] for _ in range(ROUNDS))],
    "generator's list": lambda x: list(attend(x) for _ in range(ROUNDS)),  # noqa: C400
    "yield from": lambda x: list(passed_on([x] * ROUNDS)),
    "map": lambda x: list(map(attend, [x] * ROUNDS)),
    "next": lambda x: [next(iter(Reached(x))) for _ in range(ROUNDS)],
    "index": lambda x: [Reached(x)[0] for _ in range(ROUNDS)],
    "property": lambda x: [Reached(x).value for _ in range(ROUNDS)],
    "attribute": lambda x: [Reads(x).value for _ in range(ROUNDS)],
    "object": lambda x: [Makes(x).out for _ in range(ROUNDS)],
    "eval": lambda x: [eval("attend(x)", {"attend": attend, "x": x}) for _ in range(ROUNDS)],
    "arguments": lambda x: [attend(*(x,), **{}) for _ in range(ROUNDS)],
}


class Calls(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, x):
        return self.run(x)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_is_one_attention_from_its_first_call_on(loop):
    model, x = Calls(LOOPS[loop]), torch.randn(1, 1, 4, 8)
    names = {name for _ in range(3) for name in record(model, x).heads}
    assert names == {"root"}
    assert record(model, x).of("rows") == [4 * ROUNDS * (2 if loop == "nested" else 1)]


def two_comprehensions(x):
    return [attend(one) for one in (x, x)] + [attend(one) for one in (2 * x, 2 * x)]


def two_generators(x):
    return [one for each in ((attend(a) for a in (x, x)), (attend(b) for b in (2 * x, 2 * x))) for one in each]


def nested_twins(x):
    return [torch.cat([attend(a) for a in (x, b)] + [attend(a) for a in (2 * x, 2 * b)]) for b in (x,)]


def two_lambdas(x):
    return [run(y) for run, y in ((lambda a: attend(a), x), (lambda b: attend(b), 2 * x)) for _ in range(2)]


TWINS = [two_comprehensions, two_generators, nested_twins, two_lambdas]


@pytest.mark.parametrize("twins", TWINS)
def test_two_loops_on_one_line_are_two_attentions(twins):
    x = torch.randn(1, 1, 4, 8)
    seen, alone = record(Calls(twins), x), [record(Calls(attend), y).of("entropy") for y in (x, 2 * x)]
    assert list(seen.heads) == ["root", "root/2"]
    assert [seen.of("rows", name) for name in seen.heads] == [[8], [8]]
    assert [seen.of("entropy", name) for name in seen.heads] == [pytest.approx(entropy) for entropy in alone]
