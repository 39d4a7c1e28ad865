"""Laws 3 and 4: an idle step runs no per-module hook, and nothing reads a device value on the hot path."""

from __future__ import annotations

import gc
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import torchprobe
from tests.models import FAMILIES, Transformer, inputs
from tests.modes import NoHostRead
from tests.setups.compiled import COMPILERS_WARNINGS
from torchprobe.capture import sites
from torchprobe.capture.gate import Meter
from torchprobe.probes.choosing import default_probes
from torchprobe.testing import MemoryWriter

MOST_CALLS = {
    **{"plain": 62, "several optimizers": 95, "zeroed in place": 83},
    **{"compiled": 67, "compiled with its caller": 85},
}
"""Functions of torchprobe that an idle step may enter, by the kind of loop."""
MOST_CALLS_A_MODULE, MOST_DRAIN_CALLS_A_MODULE = 230, 110
"""The same of a step that every default probe but attention samples, for each module more."""
CHANCE = 5  # calls: where `any` over a set stops depends on addresses; a block more is 23 modules and parameters


def one_step(model, optimizer, family, session):
    logits = model(inputs(family))
    loss = F.cross_entropy(logits.flatten(0, -2), torch.zeros(logits.flatten(0, -2).shape[0], dtype=torch.long))
    loss.backward()
    session.log_metrics({"loss": loss}, prefix="train")
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_value_is_read_on_the_hot_path(family):
    model = FAMILIES[family]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1) as session:
        for _ in range(3):
            with NoHostRead():
                one_step(model, optimizer, family, session)
    assert session.step == 3


def calls_into_torchprobe(run, *args) -> list[str]:
    """Names of torchprobe's functions that the training thread enters while `run` runs."""
    called = []

    def profile(frame, event, arg):
        if event == "call" and frame.f_globals.get("__name__", "").startswith("torchprobe"):
            called.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        run(*args)
    finally:
        sys.setprofile(None)
    return called


def test_an_idle_step_calls_no_module_hook_and_does_not_depend_on_the_models_size():
    counts = []
    for layers in (1, 6):
        model = Transformer(layers=layers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torchprobe.instrument(model, writer=MemoryWriter(), every=100) as session:
            for _ in range(5):  # 1, 2, 4 and 5 are timed
                one_step(model, optimizer, "transformer", session)
            called = calls_into_torchprobe(one_step, model, optimizer, "transformer", session)
            assert sites.observe_output.__name__ not in called
            assert not any(sites.observe_output in m._forward_hooks.values() for m in model.modules())
        counts.append(len(called))
    assert abs(counts[1] - counts[0]) <= CHANCE
    assert counts[0] < 250


def idle_calls(kind: str, layers: int, **options) -> list[str]:
    """What an idle step of a loop enters: no value is logged, no probe is due."""
    model = Transformer(layers=layers)
    parameters = list(model.parameters())
    groups = (parameters[:3], parameters[3:]) if kind == "several optimizers" else (parameters,)
    optimizers = [torch.optim.SGD(group, lr=0.1) for group in groups]
    called_with = {"compiled": model, "compiled with its caller": lambda x: model(x)}.get(kind)
    callee = model if called_with is None else torch.compile(called_with, backend="eager")
    idle = 13 if kind == "compiled with its caller" else 7  # it listens at all parameters in three idle steps

    def step() -> None:
        callee(inputs("transformer")).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=kind != "zeroed in place")

    with torchprobe.instrument(model, writer=MemoryWriter(), **options) as session:
        for _ in range(idle - 1):  # 1, 2, 5 and 10 are sampled by default
            step()
        called = calls_into_torchprobe(step)
    assert session.step == idle
    return called


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=COMPILERS_WARNINGS if "compiled" in kind else ()) for kind in MOST_CALLS]
)
def test_an_idle_step_of_each_kind_of_loop_makes_few_calls_whatever_the_models_size(kind):
    few, many = (idle_calls(kind, layers) for layers in (1, 3 if "compiled" in kind else 6))  # a block takes long there
    assert abs(len(many) - len(few)) <= CHANCE, Counter(many) - Counter(few)
    asked = sum(name == "records_graph" for name in few) * 2  # where torch is built for a device that records graphs
    asked += "_learns_shapes" in few  # where a pipeline's package is loaded
    assert max(len(few), len(many)) <= MOST_CALLS[kind] + asked, Counter(few)


def test_diagnoses_add_nothing_to_an_idle_step():
    probes = [torchprobe.Loss(), torchprobe.Gradients()]
    without, beside = (idle_calls("plain", 1, probes=some) for some in (probes, [*probes, torchprobe.Diagnosis()]))
    assert without == beside


def test_a_sampled_step_calls_the_hook_of_every_chosen_module():
    model = Transformer(layers=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1) as session:
        called = calls_into_torchprobe(one_step, model, optimizer, "transformer", session)
    # embedding, head, and per block: two norms, the attention block, its two projections, two linear layers
    assert called.count(sites.observe_output.__name__) == 2 + 2 * 7


def all_but_attention() -> list[torchprobe.Probe]:
    return [type(probe)(every=1) for probe in default_probes() if not isinstance(probe, torchprobe.Attention)]


def sampled_calls(layers: int, folder: Path) -> tuple[int, int]:
    """What a sampled step with event files enters: in the training thread, and in the drain thread."""
    in_drain = []

    def profile(frame, event, arg):
        if event == "call" and frame.f_globals.get("__name__", "").startswith("torchprobe"):
            in_drain.append(frame.f_code.co_name)

    model = Transformer(layers=layers)
    optimizer = torch.optim.AdamW(model.parameters())
    threading.setprofile(profile)  # of threads that start from here on
    try:
        session = torchprobe.instrument(model, log_dir=folder, probes=all_but_attention(), flush_seconds=1e6)
    finally:
        threading.setprofile(None)
    for _ in range(4):  # the first steps' tags are new
        one_step(model, optimizer, "transformer", session)
    assert session.flush()
    in_drain.clear()
    in_training = calls_into_torchprobe(one_step, model, optimizer, "transformer", session)
    assert session.flush()
    calls = len(in_training), len(in_drain)
    session.detach()
    return calls


def test_a_sampled_step_makes_few_calls_a_module_in_either_thread(tmp_path):
    few, many = (sampled_calls(layers, tmp_path / str(layers)) for layers in (1, 6))
    more = len(list(Transformer(layers=6).modules())) - len(list(Transformer(layers=1).modules()))
    in_training, in_drain = ((b - a) / more for a, b in zip(few, many, strict=True))
    assert in_training <= MOST_CALLS_A_MODULE, in_training
    assert in_drain <= MOST_DRAIN_CALLS_A_MODULE, in_drain


def garbage_of(step) -> int:
    """Objects that only the garbage collector can free."""
    gc.collect()
    gc.disable()
    try:
        step()
        return gc.collect()
    finally:
        gc.enable()


def test_a_sampled_step_leaves_nothing_for_the_garbage_collector():
    model = Transformer(layers=2)
    optimizer = torch.optim.AdamW(model.parameters())
    with torchprobe.instrument(model, writer=MemoryWriter(), every=1) as session:
        for _ in range(4):
            one_step(model, optimizer, "transformer", session)
        assert session.flush()  # the drain thread is at rest
        # The compiler's remains of other tests go with one of them.
        assert min(garbage_of(lambda: one_step(model, optimizer, "transformer", session)) for _ in range(3)) == 0


def test_what_hooks_of_a_sampled_step_do_counts_as_torchprobes_time(monkeypatch):
    """But for the few calls by which a hook is entered: what is not counted would be the user's forward or backward."""
    model, meter, counts = Transformer(layers=2), Meter(), Counter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monkeypatch.setattr("torchprobe.session.Meter", lambda: meter)

    def profile(frame, event, arg):
        if event == "call" and frame.f_globals.get("__name__", "").startswith("torchprobe"):
            counts["inside" if meter.starts else frame.f_code.co_name] += 1

    probes = [type(probe)(every=1) for probe in default_probes() if not isinstance(probe, torchprobe.Attention)]
    with torchprobe.instrument(model, writer=MemoryWriter(), probes=probes) as session:
        one_step(model, optimizer, "transformer", session)
        sys.setprofile(profile)
        one_step(model, optimizer, "transformer", session)
        sys.setprofile(None)
    assert counts.pop("inside") > 2_000
    del counts["__enter__"]  # the meter's own
    modules = sum(1 for _ in model.modules())
    assert sum(counts.values()) <= 20 * modules, counts.most_common(20)
