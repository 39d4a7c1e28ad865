"""One training step of a model, bare and watched, and what was recorded beside what is true."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import torchprobe
from benchmarks.families.truth import STATISTICS, Recorder
from torchprobe.testing import MemoryWriter

Forward = Callable[[nn.Module], Any]


@dataclass
class Verdict:
    """Of a family. there: how many attentions it has; error: the largest, relative above 1.

    said: how many are not recorded and a line names the module; missed: those of which nothing is said; extra: what
    was recorded and is not there; wrong: the largest error where it is no rounding.
    """

    name: str
    there: int = 0
    found: int = 0
    said: int = 0
    error: float = 0.0
    equal: bool = True
    missed: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    problem: str = ""

    as_dict = asdict


def verdict(name: str, model: nn.Module, forward: Forward) -> Verdict:
    """Of one model; forward: calls it."""
    bare = _trained(copy.deepcopy(model), forward)
    recorder = Recorder(truth := copy.deepcopy(model).train())
    _seed()
    with torch.no_grad(), recorder.watching():
        forward(truth)
    writer, lines = MemoryWriter(), _Lines()
    session = torchprobe.instrument(model, writer=writer, probes=[torchprobe.Attention(every=1, rows="all")])
    watched = _trained(model, forward)
    session.flush()
    lines += str(session.summary()).splitlines()
    session.detach()
    result = Verdict(name, equal=all(torch.equal(a, b) for a, b in zip(bare, watched, strict=True)))
    _compare(result, recorder, _recorded(writer), lines)
    return result


def _trained(model: nn.Module, forward: Forward) -> list[Tensor]:
    _seed()
    optimizer = torch.optim.SGD(model.train().parameters(), 1e-3)
    with sdpa_kernel(SDPBackend.MATH):  # as what is true is computed: numbers behind it may depend on the kernel
        loss = sum(out.float().square().mean() for out in _outputs(forward(model)))
    loss.backward()
    optimizer.step()
    return [parameter.detach().nan_to_num(7.0) for parameter in model.parameters()]


def _seed() -> None:
    torch.manual_seed(1), np.random.seed(1), random.seed(1)  # some families mask by the others


def _outputs(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.requires_grad and value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _outputs(one)
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _outputs(one)


class _Lines(list[str]):
    """What the log and the summary say of attention that is not recorded."""

    def of(self, module: str) -> bool:
        """Whether a line names the module, or one around it or within it."""
        return any(_names(line, module) for line in self)


def _names(line: str, module: str) -> bool:
    found = re.search(r"the attention of ([\w.]+)|calls in ([\w.]+)", line)
    named = found and (found[1] or found[2])
    return bool(named) and ("not" in line) and _related(str(named).rstrip("."), module)


def _related(one: str, other: str) -> bool:
    one, other = ("" if name == "root" else name for name in (one, other))
    return one == other or (one + ".").startswith(other + ".") or (other + ".").startswith(one + ".")


def _recorded(writer: MemoryWriter) -> dict[str, dict[str, float]]:
    sites: dict[str, dict[str, float]] = {}
    for tag in writer.tags():
        statistic, _, site = tag.partition("/")
        statistic = statistic.removeprefix("attention_")
        if tag.startswith("attention_") and statistic in STATISTICS:
            sites.setdefault(site, {})[statistic] = writer.scalars(tag)[-1][1]
    return sites


def _compare(result: Verdict, recorder: Recorder, found: dict[str, dict[str, float]], lines: _Lines) -> None:
    there = recorder.sites()
    result.there, left = len(there), dict(found)
    result.lines = [line for line in lines if "attention" in line]
    for (module, _), right in there.items():
        near = [site for site in left if _related(re.sub(r"/(cross|\d+)", "", site), module)]
        best = min(near, key=lambda site: _error(left[site], right), default=None)
        if best is None:
            result.said += lines.of(module)
            result.missed += [] if lines.of(module) else [module]
            continue
        result.found += 1
        error = _error(left.pop(best), right)
        result.error = max(result.error, error)
        result.wrong += [f"{best} {found[best]} {right}"] if error > 1e-4 else []
    result.extra = list(left)


def _error(got: dict[str, float], right: dict[str, float]) -> float:
    common = [name for name in right if name in got and right[name] == right[name]]
    return max((abs(got[name] - right[name]) / max(1.0, abs(right[name])) for name in common), default=0.0)
