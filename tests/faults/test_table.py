"""One fault at a time: what it takes along, what is said, and that training is what it is without torchprobe.

A row is a name, the fault, the tags that are lost by it, and words of the line that says so; all other tags of a
healthy run are there.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchprobe
from tests.loaders import python_points
from torchprobe.probes.choosing import default_probes
from torchprobe.rules.choosing import checked_rules
from torchprobe.testing import MemoryWriter

STEPS = 6
HEALTHY = (
    "overview/loss",
    "overview/grad_norm",
    "grad_norm/first.weight",
    "param_norm/last.bias",
    "update_ratio/first.weight",
    "activation_mean/first",
    "activation_grad_norm/last",
    "lr/SGD/group_0",
)


@dataclass
class Run:
    """A small run that a fault may change before it begins, or in the middle."""

    model: nn.Module
    tmp: Path
    options: dict[str, Any] = field(default_factory=lambda: {"every": 1})
    optimizer: torch.optim.Optimizer | None = None
    before_step: Callable[[int], None] = lambda k: None
    watched: bool = True


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.shape_of = lambda y: y

    def forward(self, x: Tensor) -> Any:
        return self.shape_of(self.last(self.first(x).tanh()))


class Raises(torchprobe.Probe):
    source, fields, reduce = "outputs", ("value",), "mean"
    error: BaseException = RuntimeError("planted")
    where = "compute"

    def compute(self, tensor: Tensor) -> Tensor:
        if self.where == "compute":
            raise self.error
        return tensor.mean().reshape(1)

    def report(self, name, values):
        if self.where == "report":
            raise self.error
        yield f"mine/{name}", values["value"]


class Broken(MemoryWriter):
    """Cannot write the records of one step, whatever is in them."""

    def write(self, records):
        raise OSError(errno.ENOSPC, "No space left on device")


def raising(error: BaseException) -> Callable[..., Any]:
    def function(*args: Any) -> Any:
        raise error

    return function


# ---- the faults


def probe_raises(run: Run) -> None:
    run.options["probes"] = [*default_probes(), Raises()]


def probe_exits(run: Run) -> None:
    kind = type("Exits", (Raises,), {"error": SystemExit(3), "where": "report"})
    run.options["probes"] = [*default_probes(), kind()]


def report_raises(run: Run) -> None:
    kind = type("ReportRaises", (Raises,), {"where": "report"})
    run.options["probes"] = [*default_probes(), kind()]


def rule_raises(run: Run) -> None:
    def my_rule(record: Any) -> Any:
        raise ZeroDivisionError("planted")

    run.options["rules"] = [*checked_rules(None), my_rule]


def alert_callback_exits(run: Run) -> None:
    def each_step(record: Any) -> Any:
        return torchprobe.Alert("each_step", record.step, None, 1.0, 0.0, "planted")

    run.options |= {"rules": [each_step], "on_alert": raising(SystemExit("planted"))}


def schedule_raises(run: Run) -> None:
    run.options["probes"] = [*default_probes(), torchprobe.Histograms(every=raising(KeyError("planted")))]


def rate_is_none(run: Run) -> None:
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": None, "note": "never stepped"})
    run.optimizer = optimizer


def output_raises(run: Run) -> None:
    class Odd(dict):
        @property
        def loss(self) -> Tensor:
            raise RuntimeError("planted")

    run.model.shape_of = lambda y: Odd(logits=y)


def frozen_integers(run: Run) -> None:
    for kind in (torch.int8, torch.int64, torch.bool):
        run.model.register_parameter(f"frozen_{str(kind)[6:]}", nn.Parameter(torch.ones(3).to(kind), False))


def list_holds_none(run: Run) -> None:
    run.model.odd = nn.ModuleList([None, nn.Linear(2, 2)])  # type: ignore[list-item]


def sparse_output(run: Run) -> None:
    run.model.shape_of = lambda y: (y, torch.eye(3).to_sparse())


def user_step_hook_goes(run: Run) -> None:
    assert run.optimizer is not None
    handle = run.optimizer.register_step_post_hook(lambda *args: handle.remove())


def layer_is_replaced(run: Run) -> None:
    def replace(k: int) -> None:
        if k == 2:
            torch.manual_seed(11)
            run.model.last = nn.Linear(6, 3)
            assert run.optimizer is not None
            run.optimizer.add_param_group({"params": [*run.model.last.parameters()]})

    run.before_step = replace


def interrupted_forward(run: Run) -> None:
    def interrupt(k: int) -> None:
        if k == 3:
            run.model.shape_of = raising(KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                run.model(torch.ones(2, 4))
            run.model.shape_of = lambda y: y

    run.before_step = interrupt


def forward_raises(run: Run) -> None:
    def fail(k: int) -> None:
        if k == 3:
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                run.model(torch.ones(2, 5))

    run.before_step = fail


def backward_raises(run: Run) -> None:
    def fail(k: int) -> None:
        if k == 3:
            loss = run.model(torch.ones(2, 4)).square().mean()
            loss.register_hook(raising(ValueError("planted")))
            with pytest.raises(ValueError, match="planted"):
                loss.backward()
            run.model.zero_grad()

    run.before_step = fail


def writer_is_full(run: Run) -> None:
    run.options["writer"] = Broken()


def directory_goes(run: Run) -> None:
    run.options |= {"writer": None, "log_dir": run.tmp / "run"}

    def remove(k: int) -> None:
        if k == 3 and run.watched:
            torchprobe.session_of(run.model).flush()  # type: ignore[union-attr]
            shutil.rmtree(run.tmp / "run")

    run.before_step = remove


def file_is_truncated(run: Run) -> None:
    run.options |= {"writer": None, "log_dir": run.tmp / "run"}

    def truncate(k: int) -> None:
        if k == 3 and run.watched:
            torchprobe.session_of(run.model).flush()  # type: ignore[union-attr]
            os.truncate(next((run.tmp / "run").glob("events.*")), 0)

    run.before_step = truncate


@dataclass(frozen=True)
class Row:
    fault: Callable[[Run], None]
    says: str = ""
    lost: tuple[str, ...] = ()


FAULTS = [
    Row(probe_raises, "probe Raises failed and is switched off"),
    Row(probe_exits, "Exits"),
    Row(report_raises, "ReportRaises"),
    Row(rule_raises, "my_rule"),
    Row(alert_callback_exits, "on_alert"),
    Row(schedule_raises, "the schedule of GradientHistograms, ParameterHistograms raised"),
    Row(rate_is_none),
    Row(output_raises),
    Row(frozen_integers),
    Row(list_holds_none),
    Row(sparse_output),
    Row(user_step_hook_goes),
    Row(layer_is_replaced),
    Row(interrupted_forward),
    Row(forward_raises),
    Row(backward_raises),
    Row(writer_is_full, "writing failed", HEALTHY),
    Row(directory_goes, "run"),
    Row(file_is_truncated, "events"),
]


def trained(row: Row, tmp: Path, watched: bool) -> tuple[list[Tensor], dict[str, list[int]], torchprobe.Session | None]:
    """Weights at the end; the steps of each tag, as far as they were written."""
    torch.manual_seed(5)
    run = Run(Net(), tmp, {"every": 1, "writer": MemoryWriter()}, watched=watched)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    row.fault(run)
    session = torchprobe.instrument(run.model, **run.options) if watched else None
    for k in range(STEPS):
        run.before_step(k)
        output = run.model(torch.randn(8, 4))
        while not isinstance(output, Tensor):
            output = output["logits"] if isinstance(output, dict) else output[0]
        output.square().mean().backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    steps: dict[str, list[int]] = {}
    if session is not None:
        session.detach()
        writer = run.options["writer"]
        if writer is not None:
            steps = {tag: [step for step, _ in writer.scalars(tag)] for tag in writer.tags()}
        else:
            steps = {tag: [step for step, _ in points] for tag, points in python_points(run.tmp / "run").items()}
    return [p.detach().clone() for p in run.model.parameters()], steps, session


@pytest.mark.parametrize("row", FAULTS, ids=lambda row: row.fault.__name__)
def test_a_fault_takes_nothing_along(row, tmp_path, caplog):
    bare, *_ = trained(row, tmp_path, watched=False)
    with caplog.at_level(logging.WARNING):
        weights, steps, session = trained(row, tmp_path, watched=True)
    assert all(map(torch.equal, bare, weights))
    assert session is not None
    assert session.step == STEPS
    said = [record.getMessage() for record in caplog.records if row.says and row.says in record.getMessage()]
    assert bool(said) == bool(row.says), caplog.messages
    off = row.fault in (probe_raises, probe_exits, report_raises, schedule_raises)
    assert ("is left out: its" in session.summary()) == off
    for tag in HEALTHY:
        known = tag in steps and max(steps[tag]) == STEPS
        assert known == (tag not in row.lost), (tag, steps.get(tag))
