"""Loss modules are heard wherever they are, and are left as they were."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.probes.calibrated import assert_calibration, batch, net, watch
from torchprobe.capture.predictions import hooks
from torchprobe.testing import MemoryWriter


class Mine(nn.CrossEntropyLoss):
    """A user's own kind."""


def step(model, criterion, seed=0):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = batch(seed)
    out = model(x)
    criterion(out, y).backward()
    optimizer.step()
    return out, y


@pytest.mark.parametrize("batches", [1, 3, 20])
def test_validation_with_gradients_that_nobody_asks_for_is_judged_too(batches):
    model, writer, criterion = net(), MemoryWriter(), nn.CrossEntropyLoss()
    with watch(model, writer):
        step(model, criterion)
        model.eval()
        given = [batch(seed) for seed in range(batches)]
        outs = [(model(x), y) for x, y in given if criterion(model(x), y) is not None]
        other = nn.CrossEntropyLoss()(model(given[0][0]) * 2, given[0][1])  # of something else
        del other
    p, y = torch.cat([out.softmax(-1) for out, _ in outs]), torch.cat([y for _, y in outs])
    assert_calibration(writer, 1, p, y, "val/")


@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, Mine])
@pytest.mark.parametrize("holder", [lambda c: c, lambda c: {"losses": [c]}, lambda c: lambda: c])
def test_validation_is_judged_by_a_loss_module_in_any_object(kind, holder):
    model, writer, held = net(), MemoryWriter(), holder(kind())
    criterion = held if isinstance(held, nn.Module) else held["losses"][0] if isinstance(held, dict) else held()
    with watch(model, writer):
        step(model, F.cross_entropy)
        x, y = batch(1)
        with torch.no_grad():
            out = model.eval()(x)
            criterion(out, y)
    assert_calibration(writer, 1, out.softmax(-1), y, "val/")


def test_one_that_is_made_for_validation_is_found_there():
    model, writer = net(), MemoryWriter()
    with watch(model, writer):
        step(model, F.cross_entropy)
        criterion = Mine()
        with torch.no_grad():
            x, y = batch(1)
            out = model.eval()(x)
            criterion(out, y)
    assert_calibration(writer, 1, out.softmax(-1), y, "val/")


def test_those_that_are_made_at_each_call_never_speak_for_a_part_of_the_batches():
    model, writer = net(), MemoryWriter()
    with watch(model, writer) as session:
        step(model, F.cross_entropy)
        for seed in range(3):
            x, y = batch(seed)
            with torch.no_grad():  # one is there before the model is called, so that the first one may be found
                nn.CrossEntropyLoss()(model.eval()(x), y)
        session.flush()
        assert "made at each call" in session.summary()
    assert not any(tag.startswith("val/calibration/") for tag in writer.tags())


def test_one_that_is_gone_after_its_loop_has_judged_all_of_it():
    model, writer = net(), MemoryWriter()
    with watch(model, writer):
        step(model, F.cross_entropy)
        criterion, given, outs = nn.CrossEntropyLoss(), [batch(seed) for seed in range(3)], []
        with torch.no_grad():
            for x, y in given:
                outs.append(model.eval()(x).softmax(-1))
                criterion(outs[-1].log(), y)
            del criterion
            model(x + 1)  # a look at something else
    assert_calibration(writer, 1, torch.cat(outs), torch.cat([y for _, y in given]), "val/")


def focal(out, y):
    return (F.cross_entropy(out, y, reduction="none") * 0.3 + out.logsumexp(-1).square()).mean()


@pytest.mark.parametrize(("loss", "looks"), [(F.cross_entropy, 1), (focal, 2)], ids=["plain", "with_more"])
def test_looks_are_few_where_the_loss_is_a_function(monkeypatch, loss, looks):
    """One, and none later where the gradient tells what a call would."""
    seen, classes = [], hooks._classes
    monkeypatch.setattr(hooks, "_classes", lambda: seen.append(1) or classes())
    model = net()
    with watch(model, MemoryWriter()):
        for seed in range(120):
            step(model, loss, seed)
    assert len(seen) == looks


def test_one_made_after_the_first_validation_is_found_in_a_later_one():
    """Where training calls no loss module, and its gradients need none."""
    model, writer = net(), MemoryWriter()
    criteria = [nn.CrossEntropyLoss()]
    with watch(model, writer):
        for seed in range(102):
            step(model, F.cross_entropy, seed)
            if seed in (0, 101):
                criteria.append(Mine())
                with torch.no_grad():
                    x, y = batch(200)
                    out = model.eval()(x)
                    criteria[-1](out, y)
                model.train()
                criteria.pop(0)
    assert_calibration(writer, 102, out.softmax(-1), y, "val/")


def test_a_later_look_finds_what_was_made_in_between():
    model, writer = net(), MemoryWriter()
    with watch(model, writer):
        step(model, F.cross_entropy)
        weighted = nn.CrossEntropyLoss(torch.arange(1.0, 6.0), label_smoothing=0.3)  # its gradients do not tell
        for seed in range(1, 103):
            step(model, weighted, seed)
    assert [step for step, _ in writer.scalars("calibration/ece")] == [1, 101, 102, 103]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_of_a_loss_module_work_and_tell_nothing(copied):
    model, writer, criterion = net(), MemoryWriter(), nn.CrossEntropyLoss()
    with watch(model, writer):
        step(model, criterion)
        other = copied(criterion)
        with torch.no_grad():
            x, y = batch(1)
            assert torch.equal(other(model.eval()(x), y), criterion(model(x), y))
    assert not any("torchprobe" in type(hook).__module__ for hook in other._forward_hooks.values())


def test_a_pickled_loss_module_loads_without_torchprobe(tmp_path):
    model, criterion = net(), nn.CrossEntropyLoss()
    with watch(model, MemoryWriter()):
        step(model, criterion)
        (tmp_path / "loss").write_bytes(pickle.dumps(criterion))
    code = "import pickle, sys; sys.modules['torchprobe'] = None; pickle.loads(open(sys.argv[1], 'rb').read())"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "loss")], check=True)


def test_no_loss_module_is_kept_alive_and_no_hook_is_left():
    model, criterion, kept = net(), nn.CrossEntropyLoss(), nn.MSELoss()
    gone = weakref.ref(criterion)
    with watch(model, MemoryWriter()):
        step(model, criterion)
        assert len(kept._forward_hooks) == 1
        del criterion
        gc.collect()
        assert gone() is None
    assert not kept._forward_hooks
    assert not kept._forward_hooks_with_kwargs


def test_an_unwatched_step_hears_of_no_loss(monkeypatch):
    model, criterion = net(), nn.CrossEntropyLoss()
    with watch(model, MemoryWriter(), every=100):
        step(model, criterion)
        calls = []
        monkeypatch.setattr("torchprobe.capture.predictions.targets.read_call", lambda *_: calls.append(1))
        step(model, criterion, 1)
        assert not calls


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which Dynamo hides by itself, unless it is an error
def test_a_compiled_loss_is_compiled_once_and_so_is_a_net_that_nobody_watches():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, criterion, teacher = net(), nn.CrossEntropyLoss(), net()
    loss = torch.compile(lambda out, y: criterion(out, y), backend=backend, fullgraph=True)
    other = torch.compile(teacher, backend=backend, fullgraph=True)
    with watch(model, MemoryWriter()):
        for seed in range(10):
            step(model, lambda out, y: loss(out, y) + other(out[:, :4]).square().mean(), seed)
    assert len(graphs) == 2


@pytest.mark.parametrize("how", ["cast", "sliced", "of another model", "scaled"])
def test_only_the_output_itself_or_its_values_are_judged(how):
    model, other, writer, criterion = net(), net(), MemoryWriter(), nn.CrossEntropyLoss()
    with watch(model, writer):
        step(model, F.cross_entropy)
        x, y = batch(1)
        with torch.no_grad():
            out = model.eval()(x)
            handed = {"cast": out.double(), "sliced": out[3:], "of another model": other(x), "scaled": out / 2}[how]
            criterion(handed, y[3:] if how == "sliced" else y)
    assert ("val/calibration/ece" in writer.tags()) == (how == "cast")


@pytest.mark.parametrize("of", ["logits", "probabilities"])
def test_the_mean_of_several_passes_is_judged_in_validation(of):
    """At the passes' mean prediction, as in training."""
    model, writer, criterion = nn.Sequential(net(), nn.Dropout(0.3)), MemoryWriter(), nn.CrossEntropyLoss()
    given, means = [batch(1), batch(2, size=16)], []
    with watch(model, writer):
        step(model, criterion)
        with torch.no_grad():
            for x, y in given:
                z = torch.stack([model(x) for _ in range(4)])
                means.append(z.softmax(-1).mean(0))
                criterion(z.mean(0) if of == "logits" else means[-1].log(), y)
    assert_calibration(writer, 1, torch.cat(means), torch.cat([y for _, y in given]), "val/")
