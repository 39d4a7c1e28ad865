"""Inside a compiled forward the row is the same, and there is one graph."""

from __future__ import annotations

import math

import pytest
import torch

from torchprobe.statistics import moments

CASES = {
    "matrix": lambda: torch.randn(30, 7) + 1000,
    "transposed float16": lambda: torch.randn(31, 7).half().t(),
    "bfloat16": lambda: torch.randn(40).bfloat16(),
    "float64": lambda: torch.randn(5, dtype=torch.float64),
    "complex": lambda: torch.randn(3, dtype=torch.complex64),
    "scalar": lambda: torch.tensor(3.0),
    "empty": lambda: torch.zeros(0, 4),
    "expanded": lambda: torch.randn(1, 5).expand(7, 5),
    "not finite": lambda: torch.tensor([math.nan, 1.0, math.inf, 1e38, -1e38, 0.0]),
}


def assert_same(row: torch.Tensor, x: torch.Tensor) -> None:
    torch.testing.assert_close(row, moments.compute(x), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_it_traces_into_one_graph(make):
    x = make()
    assert_same(torch.compile(moments.compute, fullgraph=True, backend="aot_eager")(x), x)


def test_one_graph_serves_all_sizes():
    compiled = torch.compile(moments.compute, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (20, 33, 300_000):
            x = torch.randn(n)
            assert_same(compiled(x), x)


def test_combine_traces_too():
    a, b = (moments.compute(torch.randn(n) + n) for n in (5, 9))
    compiled = torch.compile(moments.combine, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b), moments.combine(a, b), rtol=1e-14, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, while it generates code
@pytest.mark.parametrize("case", ["matrix", "bfloat16", "not finite", "expanded"])
def test_generated_code_gives_the_same_row(case):
    x = CASES[case]()
    assert_same(torch.compile(moments.compute, fullgraph=True, backend="inductor")(x), x)
