"""Every model family in every set-up of one process, against a plain eager run: the same numbers under the same tags.

python -m tests.setups.matrix        # prints the table of docs/setups.md

The plain run is a twin in float64. At every step it stands at the weights that the set-up's run itself had there, so
that steps do not add up what compilers, kernels and processors round differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import torchprobe
from tests.clocks import reproducible
from tests.models import FAMILIES, inputs
from tests.setups.reference import Weights, following
from torchprobe.naming import unwrapped
from torchprobe.records import Histogram
from torchprobe.testing import MemoryWriter

STEPS = 3
SCALAR = {"cpp.simdlen": 1}  # halves Inductor's time for a graph; vectors of numbers: test_compiled.py
ROWS = 12
TINY = 1e-4  # of the largest value of a tag group: below it a number is rounding
_OWN = ("overview/dropped_records", "overview/skipped_steps")
_NOT_OF_TWINS = ("val/", "nothing_captured/UnitActivity", "optimizer/")  # whose optimizer is told where to go

Step = Callable[[nn.Module, torch.optim.Optimizer, int], None]


@dataclass(frozen=True)
class Setup:
    """How a run differs from the plain one. wrap: makes of the model what the loop calls."""

    wrap: Callable[[nn.Module], nn.Module] = lambda model: model
    step: Step | None = None
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    instrument_after: bool = False
    why_not: dict[str, str] | None = None  # by family: what this set-up cannot do
    shallow: bool = False  # a transformer of one block
    not_watched: tuple[str, ...] = ()  # beginnings of tags that this set-up does not have


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, k: int) -> None:
    optimizer.zero_grad()
    loss(model, *batch(model, k)).backward()
    optimizer.step()


def accumulated_step(model: nn.Module, optimizer: torch.optim.Optimizer, k: int) -> None:
    """Uneven micro-batches, each weighted by its share."""
    optimizer.zero_grad()
    x, target = batch(model, k)
    for part in (slice(4), slice(4, ROWS)):  # fewer rows of three classes would not tell that it is a cross-entropy
        (loss(model, x[part], target[part]) * len(x[part]) / len(x)).backward()
    optimizer.step()


def scaled_step(model: nn.Module, optimizer: torch.optim.Optimizer, k: int) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer.zero_grad()
    scaler.scale(loss(model, *batch(model, k))).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


def closure_step(model: nn.Module, optimizer: torch.optim.Optimizer, k: int) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(model, *batch(model, k))
        value.backward()
        return value

    optimizer.step(closure)


def validated_step(model: nn.Module, optimizer: torch.optim.Optimizer, k: int) -> None:
    plain_step(model, optimizer, k)
    model.eval()
    with torch.no_grad():
        model(batch(model, 50 + k)[0])
    model.train()


def compiled(backend: str, **options: object) -> Callable[[nn.Module], nn.Module]:
    return lambda model: torch.compile(model, backend=backend, **options)


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_by_part(model: nn.Module) -> nn.Module:
    for part in getattr(model, "blocks", model.children()):
        part.compile(backend="eager")
    return model


class Checkpointed(nn.Module):
    """A part that is run again in the backward pass."""

    def __init__(self, part: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self._checkpoint_wrapped_module = part
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point():
            return self._checkpoint_wrapped_module(x)
        if self.reentrant:
            x = x.requires_grad_() if x.is_leaf else x
        return checkpoint(self._checkpoint_wrapped_module, x, use_reentrant=self.reentrant)


def checkpointed(reentrant: bool) -> Callable[[nn.Module], nn.Module]:
    def wrap(model: nn.Module) -> nn.Module:
        if isinstance(model, nn.Sequential):  # in-place ReLU changes what a checkpointed layer keeps
            return Checkpointed(model, reentrant)
        holder = getattr(model, "blocks", model)
        for name, part in list(holder.named_children()):
            setattr(holder, name, Checkpointed(part, reentrant))
        return model

    return wrap


_NO_LSTM = {"lstm": "Dynamo does not trace LSTM"}
_SLOW = {"cnn": "compiled with the other backends already"}
_COMPILED = ("dead_units/",)
_OF_OUTPUT = ("calibration", "overview/ece", "uncertainty_total")
TRACES_OWN_CALL = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 14)
"""Whether `model.compile()` has the call of a model of torch's own classes, and so its output, in the graph."""
_BATCH_NORM = {"cnn": "batch normalisation sees other batches"}

SETUPS: dict[str, Setup] = {
    "plain": Setup(),
    "instrumented after the optimizer": Setup(instrument_after=True),
    "gradient accumulation, uneven": Setup(step=accumulated_step, why_not=_BATCH_NORM),
    "GradScaler": Setup(step=scaled_step),
    "optimizer with a closure": Setup(step=closure_step),
    "fused optimizer": Setup(optimizer=lambda p, **o: torch.optim.AdamW(p, fused=True, **o)),
    "validation between the steps": Setup(step=validated_step),
    "checkpointing": Setup(checkpointed(reentrant=False)),
    "checkpointing, reentrant": Setup(checkpointed(reentrant=True)),
    "torch.compile, aot_eager": Setup(compiled("aot_eager", fullgraph=True), why_not=_NO_LSTM, not_watched=_COMPILED),
    "model.compile()": Setup(compiled_in_place, why_not=_NO_LSTM, not_watched=_COMPILED),
    "compiled by part": Setup(compiled_by_part, why_not=_NO_LSTM, not_watched=_COMPILED),
    "torch.compile, inductor": Setup(
        compiled("inductor", options=SCALAR), why_not=_NO_LSTM | _SLOW, not_watched=_COMPILED, shallow=True
    ),
}


def batch(model: nn.Module, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs, and class numbers for each row or each token."""
    family = unwrapped(model).family
    x = torch.cat([inputs(family, seed=10 * k + i) for i in range(4)])[:ROWS]
    shape = x.shape if family in ("lstm", "transformer") else x.shape[:1]
    target = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(k))
    return x.to(next(model.parameters()).dtype) if x.is_floating_point() else x, target


def loss(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x).flatten(0, -2), target.flatten())


def made(family: str, shallow: bool = False) -> nn.Module:
    """The family's model without dropout, whose random numbers differ between set-ups."""
    torch.manual_seed(0)
    model = FAMILIES[family](**{"layers": 1} if shallow and family == "transformer" else {})
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.LSTM):
            module.dropout = 0.0
    if family == "cnn":
        model[0].register_parameter("bias", None)  # before batch normalisation its gradient is but rounding
    model.family = family
    return model


def run(family: str, setup: Setup) -> tuple[MemoryWriter, Weights]:
    """Train for a few steps with every probe at every step."""
    torch._dynamo.reset()
    model, writer, weights = made(family, setup.shallow), MemoryWriter(), []
    callable_ = setup.wrap(model)
    optimizer = setup.optimizer(model.parameters(), lr=1e-2) if setup.instrument_after else None
    with torchprobe.instrument(callable_, writer=writer, every=1):
        optimizer = optimizer or setup.optimizer(model.parameters(), lr=1e-2)
        for k in range(STEPS):
            (setup.step or plain_step)(callable_, optimizer, k)
            weights.append([p.detach().clone() for p in model.parameters()])
    return writer, weights


def twin(family: str, weights: Weights, shallow: bool = False) -> MemoryWriter:
    """The plain eager loop in float64, which is after each step where another run was."""
    model, writer = made(family, shallow).double(), MemoryWriter()
    optimizer = following(weights, torch.optim.AdamW)(model.parameters(), lr=1e-2)
    with torchprobe.instrument(model, writer=writer, every=1):
        for k in range(STEPS):
            plain_step(model, optimizer, k)
    return writer


@dataclass(frozen=True)
class Outcome:
    """tags: how many both runs have. missing, extra: those of one alone. worst: the largest relative difference."""

    tags: int
    missing: list[str]
    extra: list[str]
    worst: float
    where: str


def outcome(family: str, setup: Setup) -> Outcome:
    """A set-up's run against its plain eager twin."""
    other, weights = run(family, setup)
    plain = twin(family, weights, setup.shallow)
    ours, theirs = ({*filter(reproducible, writer.tags())} - {*_OWN} for writer in (plain, other))
    inside = TRACES_OWN_CALL and setup.wrap is compiled_in_place and isinstance(made(family), nn.Sequential)
    not_watched = setup.not_watched + (_OF_OUTPUT if inside else ())
    missing = sorted(tag for tag in ours - theirs if not tag.startswith(not_watched))
    extra = sorted(tag for tag in theirs - ours if not tag.startswith(_NOT_OF_TWINS))
    deviations = {tag: deviation(plain, other, tag) for tag in ours & theirs}
    where = max(deviations, key=deviations.__getitem__)
    return Outcome(len(deviations), missing, extra, deviations[where], where)


def deviation(plain: MemoryWriter, other: MemoryWriter, tag: str) -> float:
    """The largest difference of a tag's values at any step, relative to their size; inf where steps differ."""
    here, there = (dict(series(writer, tag)) for writer in (plain, other))
    if here.keys() != there.keys():
        return math.inf
    return max(
        (abs(a - there[k]) / max(abs(a), abs(there[k]), least(plain, tag, k)) for k, a in here.items()), default=0
    )


def least(writer: MemoryWriter, tag: str, step: int) -> float:
    """What is so small beside its kind, or a mean beside its deviation, is rounding."""
    group, _, name = tag.partition("/")
    if group == "activation_mean":
        return float(writer.value(f"activation_std/{name}", step))
    values = (v for record in writer.records for t, v in record.values.items() if t.startswith(f"{group}/"))
    return TINY * max((abs(v) for v in values if isinstance(v, float)), default=0.0) + 1e-12


def series(writer: MemoryWriter, tag: str) -> Iterator[tuple[int, float]]:
    """Numbers of every step; of a histogram how many elements it is of, since those at an edge may change sides."""
    for record in writer.records:
        value = record.values.get(tag)
        if isinstance(value, Histogram):
            zeros = record.values.get(tag.replace("gradients/", "gradients_zeros/"), 0.0)
            yield record.step, float(value.counts.sum()) + (zeros if isinstance(zeros, float) else 0.0)
        elif isinstance(value, float | int) and not tag.startswith("gradients_zeros/"):
            yield record.step, float(value)


def cases() -> list[tuple[str, str]]:
    """(family, set-up), where the set-up is possible."""
    return [(f, s) for s in SETUPS for f in FAMILIES if f not in (SETUPS[s].why_not or {})]


def table() -> str:
    """Markdown: the largest relative difference of any tag, by set-up and family."""
    lines = ["| set-up | " + " | ".join(FAMILIES) + " |", "| --- |" + " --- |" * len(FAMILIES)]
    for name, setup in SETUPS.items():
        cells = []
        for family in FAMILIES:
            if family in (setup.why_not or {}):
                cells.append("-")
            else:
                found = outcome(family, setup)
                complete = not found.missing and not found.extra
                cells.append(f"{found.worst:.0e}, {found.tags} tags" + ("" if complete else " (incomplete)"))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
