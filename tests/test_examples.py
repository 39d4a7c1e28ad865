"""Every example runs as a user would run it, and leaves what it promises."""

from __future__ import annotations

import ast
import importlib.util
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import torchprobe
from tests import warm
from torchprobe.testing import MemoryWriter

EXAMPLES = Path(__file__).parent.parent / "examples"
TAGS = {  # what each example is there to show
    "quickstart.py": "overview/grad_norm",
    "custom_probe.py": "saturated/3",
    "bayesian_transformer.py": "uncertainty_epistemic/root",
    "stable_rank.py": "stable_rank/2.weight",
    "expert_routing.py": "router_entropy/0.router",
    "noise_scale.py": "noise_scale/examples",
}


PROBES = {"stable_rank": "StableRank", "expert_routing": "ExpertRouting", "noise_scale": "GradientNoiseScale"}


def example(name):
    """The module of an example, and its probe's class."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, getattr(module, PROBES[name])


def merged(probe, parts):
    """What a probe of one source reports on parts that as many ranks have, each of several micro-batches."""
    rows = []
    for batches in parts:
        row, *others = [probe.measure(batch) for batch in batches]
        for other in others:
            row = probe.combine(row, other)
        rows.append(row.double().numpy()[None])
    total, *others = rows
    for other in others:
        total = probe.combine_rows(total, other)
    return dict(probe.reporter().report_all(["x"], total))


def test_every_example_is_listed():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(TAGS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TAGS if name != "bayesian_transformer.py"])  # has its own test
def test_example(name, tmp_path):
    command = [*warm.python(), str(EXAMPLES / name), "--steps", "40", "--log-dir", str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    series = events.Scalars(TAGS[name])
    assert len(series) >= 3
    assert len({event.value for event in series}) > 1


@pytest.mark.slow
def test_the_bayesian_transformer_keeps_its_best_and_prints_how_well_it_separates(tmp_path):
    unseen = ["--unseen", "ctypes"]  # which has few passages to look at
    options = ["--steps", "8", "--passes", "2", *unseen, "--log-dir", str(tmp_path)]
    command = [*warm.python(), str(EXAMPLES / "bayesian_transformer.py"), *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    assert last.startswith("AUROC of epistemic uncertainty, ctypes against held-out passages: ")
    assert 0 < float(last.rsplit(" ", 1)[1]) < 1
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert all(name.startswith("network.") for name in best)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert len(events.Scalars(TAGS["bayesian_transformer.py"])) == 8
    assert {"val/accuracy", "val/calibration/ece", "val/uncertainty_epistemic/root", "val/ood/auroc"} <= set(scalars)
    assert f"{events.Scalars('val/ood/auroc')[0].value:.3f}" == last.rsplit(" ", 1)[1]


@pytest.mark.parametrize(("name", "probe"), PROBES.items())
def test_a_probe_is_at_most_25_lines(name, probe):
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text())
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == probe]
    assert found.end_lineno - found.lineno + 1 <= 25


def test_the_load_and_entropy_of_experts_are_those_of_all_tokens_however_they_are_shared_out():
    module, kind = example("expert_routing")
    logits = torch.randn(37, module.EXPERTS) * 2
    found = merged(kind(), [part.split((3, len(part) - 3)) for part in logits.split((10, 27))])
    p, best = logits.softmax(-1), logits.argmax(-1)
    load = torch.bincount(best, minlength=module.EXPERTS) / len(logits)
    np.testing.assert_allclose(found["router_load/x"], load, rtol=1e-6)
    assert found["router_entropy/x"] == pytest.approx(torch.distributions.Categorical(p.mean(0)).entropy().item())


def test_the_stable_rank_is_of_weights_alone_and_not_told_by_parts():
    _, kind = example("stable_rank")
    model, writer = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)), MemoryWriter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torchprobe.instrument(model, writer=writer, probes=[kind(every=1)], rules=[]):
        model(torch.randn(8, 5)).square().sum().backward()
        optimizer.step()
    tags = [tag for tag in writer.tags() if tag.startswith("stable_rank/")]
    assert tags == ["stable_rank/0.weight", "stable_rank/2.weight"]
    weight = model[0].weight.detach().double()
    expected = (weight.square().sum() / torch.linalg.matrix_norm(weight, 2) ** 2).item()
    assert writer.value("stable_rank/0.weight") == pytest.approx(expected, rel=1e-5)
    assert merged(kind(), [[weight[:2]], [weight[2:]]]) == {}


def simple_noise_scale(gradients, examples):
    """Appendix A.1 of the paper, from the gradients of batches of so many examples each."""
    big, small = gradients.mean(0).square().sum(), gradients.square().sum(1).mean()
    large = examples * len(gradients)
    square_norm = (large * big - examples * small) / (large - examples)
    trace = (small - big) / (1 / examples - 1 / large)
    return (trace / square_norm).item()


@pytest.mark.parametrize(("mean", "scaled"), [(True, False), (False, False), (True, True)])
def test_the_noise_scale_is_the_papers_over_micro_batches(mean, scaled):
    _, kind = example("noise_scale")
    model, writer, x = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 1)), MemoryWriter(), torch.randn(3, 8, 6) + 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    with torchprobe.instrument(model, writer=writer, probes=[kind(8, every=1)], rules=[]):
        for part in x:
            scaler.scale(model(part).square().mean() / (3 if mean else 1)).backward()
        scaler.step(optimizer)
    gradients = [torch.autograd.grad(model(part).square().mean(), [*model.parameters()]) for part in x]
    flat = torch.stack([torch.cat([g.flatten() for g in some]) for some in gradients]).double()
    assert writer.value("noise_scale/examples") == pytest.approx(simple_noise_scale(flat, 8), rel=1e-4)


def test_the_noise_scale_over_two_ranks_is_that_of_all_micro_batches():
    _, kind = example("noise_scale")
    probe, gradients = kind(8), torch.randn(6, 40, dtype=torch.float64) + 1
    ranks = []
    for of_rank in gradients.split(3):  # each loss divided by 3; DDP averages over ranks
        row, *others = [probe.measure(gradient / 3) for gradient in of_rank]
        for other in others:
            row = probe.combine(row, other)
        ranks.append(row.numpy()[None])
    micro = probe.combine_rows(*ranks)
    final = probe.measure(gradients.mean(0)).numpy()[None]
    found = dict(probe.reporter().report_sources({"micro_gradients": (["w"], micro), "gradients": (["w"], final)}))
    assert found == {"noise_scale/examples": pytest.approx(simple_noise_scale(gradients, 8))}
    assert math.isfinite(found["noise_scale/examples"])
