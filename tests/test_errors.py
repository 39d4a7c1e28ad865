"""Bad input is refused at the call, by name; after that nothing of ours raises."""

from __future__ import annotations

import logging
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

import torchprobe
from tests.models import inputs, mlp
from torchprobe import user_values
from torchprobe.testing import MemoryWriter


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"every": 0}, ValueError, "every=0.*1 or more"),
        ({"every": 2.5}, TypeError, "every=2.5.*whole number"),
        ({"every": True}, TypeError, "every=True"),
        ({"flush_every": 0}, ValueError, "flush_every=0"),
        ({"flush_seconds": -1}, ValueError, "flush_seconds=-1.*above 0"),
        ({"flush_seconds": "soon"}, TypeError, "flush_seconds='soon'"),
        ({"probes": [object()]}, TypeError, "probes: got .*takes probe objects"),
        ({"probes": [torchprobe.Gradients]}, TypeError, r"Gradients\(\) with the brackets"),
        ({"probes": "gradients"}, TypeError, "takes a list of probes"),
        ({"probes": torchprobe.Gradients()}, TypeError, "takes a list of probes"),
        ({"include": "nowhere.*"}, ValueError, "include='nowhere.*' fits no module"),
        ({"exclude": 3}, TypeError, "exclude"),
        ({"overhead_budget": 3}, ValueError, "overhead_budget=3.*between 0 and 1"),
        ({"writer": object()}, TypeError, "writer=.*SummaryWriter"),
        ({"log_dir": 5, "writer": None}, TypeError, "log_dir=5"),
        ({"run_name": "../up", "writer": None}, ValueError, "run_name='../up'"),
        ({"run_name": "a/b", "writer": None}, ValueError, "run_name='a/b'"),
        ({"run_name": "", "writer": None}, ValueError, "run_name=''"),
        ({"run_name": "é" * 200, "writer": None}, ValueError, "run_name='é.*400 bytes.*255"),
        ({"run_name": "a\ud800", "writer": None}, ValueError, r"run_name='a\\ud800': takes one folder name"),
        ({"log_dir": "runs/a\ud800", "writer": None}, ValueError, "log_dir='.*half surrogate pairs"),
        ({"on_alert": lambda: None}, TypeError, "on_alert=.*takes a function of one alert"),
        ({"rules": [lambda: None]}, TypeError, "rules=.*functions of a record; this one cannot be called"),
        ({"log_dir": "a\0b", "writer": None}, ValueError, r"log_dir='a\\x00b'.*NUL"),
        ({"log_dir": "runs/" + "é" * 200, "writer": None}, ValueError, "log_dir='runs/é.*255.*400 bytes"),
        ({"log_dir": "ab/" * 2000, "writer": None}, ValueError, "log_dir='ab/.*4095 in all"),
        ({"every": lambda: True}, TypeError, "every=.*takes a number of steps, or a function of a step"),
        ({"every": lambda step, epoch: True}, TypeError, "every=.*a function of a step"),
        ({"log_dir": "runs"}, ValueError, "exclude each other"),
    ],
)
def test_a_wrong_argument_is_named(options, error, words, traces):
    model = mlp()
    with pytest.raises(error, match=words):
        torchprobe.instrument(model, **{"writer": MemoryWriter(), **options})
    assert not traces(model)


@pytest.mark.parametrize("model", ["bert-base", None, nn.Linear])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(TypeError, match=r"model=.*torch\.nn\.Module"):
        torchprobe.instrument(model, writer=MemoryWriter())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_script_module_is_refused_with_the_reason():
    with pytest.raises(TypeError, match="ScriptModule"):
        torchprobe.instrument(torch.jit.trace(nn.Linear(4, 3), inputs("mlp")), writer=MemoryWriter())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_script_module_inside_a_model_is_watched_as_others_are(traces):
    model, writer = nn.Sequential(nn.Linear(4, 4), torch.jit.trace(nn.Linear(4, 3), torch.zeros(2, 4))), MemoryWriter()
    with torchprobe.instrument(model, writer=writer, every=1, rules=[]):
        model(torch.randn(8, 4)).sum().backward()
    assert {"activation_std/0", "activation_std/1"} <= {*writer.tags()}
    assert not traces(model)


def test_a_log_directory_that_is_a_file_is_refused(tmp_path):
    file = tmp_path / "taken"
    file.write_text("x")
    for log_dir in (file, file / "below"):
        with pytest.raises(ValueError, match="is a file"):
            torchprobe.instrument(mlp(), log_dir=log_dir)


_EVEN, _CLASSES = torch.full((3, 3), 1 / 3), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("probs", "targets", "words"),
    [
        (_EVEN.to_sparse(), _CLASSES, "probs: got torch.sparse_coo, takes a dense tensor"),
        (_EVEN, _CLASSES.to_sparse(), "targets: got torch.sparse_coo, takes a dense tensor"),
        (
            torch.nested.as_nested_tensor([_EVEN[0]], layout=torch.jagged),
            _CLASSES[:1],
            "probs: got a nested tensor, takes a dense tensor",
        ),
        (_EVEN, _CLASSES.to("meta"), "targets: got a meta tensor"),
        (torch.zeros(3, 0), _CLASSES, r"probs: got shape .*at least one class"),
        (_EVEN.to(torch.float8_e4m3fn), _CLASSES.to(torch.uint16), None),
        (_EVEN.numpy(), _CLASSES.numpy().astype(np.uint64), None),
    ],
)
def test_predictions_of_any_tensor_are_taken_or_refused_and_cost_no_later_ones(probs, targets, words):
    model, writer = mlp(), MemoryWriter()
    with torchprobe.instrument(model, writer=writer, every=1) as session:
        if words is None:
            session.log_predictions(probs, targets)
        else:
            with pytest.raises((TypeError, ValueError), match=words):
                session.log_predictions(probs, targets)
        session.next_step()
        session.log_predictions(_EVEN.numpy(), _CLASSES)
    assert {tag for record in writer.records for tag in record.values if tag.endswith("calibration/accuracy")}
    assert "failed" not in str(session.summary())


@pytest.mark.parametrize(
    "metrics",
    [{"loss": np.timedelta64(3, "s")}, {"loss": "0.5"}, {"loss": None}, {"loss": [1.0]}, {3: 1.0}, [("loss", 1.0)]],
)
def test_a_metric_that_is_no_number_is_refused(metrics):
    model = mlp()
    with (
        torchprobe.instrument(model, writer=MemoryWriter()) as session,
        pytest.raises(TypeError, match=r"metrics"),
    ):
        session.log_metrics(metrics)


def test_a_metric_of_three_elements_is_dropped_with_one_warning(caplog):
    model = mlp()
    writer = MemoryWriter()
    with torchprobe.instrument(model, writer=writer) as session, caplog.at_level(logging.WARNING, "torchprobe"):
        for _ in range(3):
            session.log_metrics({"loss": torch.ones(3), "array": np.ones(2), "good": torch.tensor([2.0])})
            session.next_step()
    assert [r.getMessage().split()[1] for r in caplog.records] == ["loss", "array"]
    assert writer.scalars("good") == [(1, 2.0), (2, 2.0), (3, 2.0)]
    assert writer.scalars("loss") == []


def test_metrics_take_every_kind_of_number():
    model = mlp()
    writer = MemoryWriter()
    values = {
        "int": 3,
        "float": 0.5,
        "bool": True,
        "numpy": np.float32(1.5),
        "array": np.array(2.5),
        "tensor": torch.tensor(4.5),
        "bf16": torch.tensor([1e30], dtype=torch.bfloat16),
        "grad": torch.tensor(1.0, requires_grad=True) * 2,
        "nan": float("nan"),
    }
    with torchprobe.instrument(model, writer=writer) as session:
        session.log_metrics(values, prefix="train")
        session.next_step()
    found = {name: writer.value(f"train/{name}", 1) for name in values}
    assert found.pop("nan") != found.get("nan")
    assert found.pop("bf16") == pytest.approx(1e30, rel=1e-2)
    assert found == {
        "int": 3, "float": 0.5, "bool": 1, "numpy": 1.5, "array": 2.5, "tensor": 4.5, "grad": 2.0
    }  # fmt: skip


def test_a_tensor_that_changes_after_it_was_logged_keeps_its_logged_value():
    model = mlp()
    writer = MemoryWriter()
    running = torch.tensor(1.0)
    with torchprobe.instrument(model, writer=writer) as session:
        session.log_metrics({"running": running})
        running += 41
        session.next_step()
    assert writer.value("running") == 1.0


class Broken(torchprobe.Probe):
    source = "outputs"
    fields = ("nothing",)
    reduce = "sum"

    def compute(self, tensor):
        raise ZeroDivisionError("the probe's own bug")


def test_a_probe_that_raises_is_switched_off_and_training_goes_on(caplog):
    writer = MemoryWriter()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchprobe.instrument(model, writer=writer, probes=[Broken(every=1), torchprobe.Gradients(every=1)]):
        for _ in range(3):
            model(inputs("mlp")).sum().backward()
            optimizer.step()
    assert sum("probe Broken failed" in r.getMessage() for r in caplog.records) == 1
    assert [step for step, _ in writer.scalars("overview/grad_norm")] == [1, 2, 3]


def test_a_failure_of_our_own_stops_recording_and_not_training(caplog, monkeypatch):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = torchprobe.instrument(model, writer=MemoryWriter(), every=1)
    monkeypatch.setattr(session._recorder.clock, "end", lambda _: 1 / 0)
    for _ in range(2):
        model(inputs("mlp")).sum().backward()
        optimizer.step()
    session.detach()
    assert sum("stops recording" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"source": "weights", "fields": ("a",)}, "source is 'weights'"),
        ({"source": "outputs"}, "fields is None"),
        ({"source": "outputs", "fields": "a"}, "fields is 'a'"),
    ],
)
def test_a_probe_class_that_lacks_something_says_what(attributes, words):
    with pytest.raises(TypeError, match=words):
        type("Mine", (torchprobe.Probe,), attributes)()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: torchprobe.Attention(rows=-1), ValueError, "rows=-1: takes a whole number of rows, 1 or more$"),
        (lambda: torchprobe.Gradients(select=lambda name: True), TypeError, "select=.*takes patterns, or a function"),
        (lambda: torchprobe.Gradients(select=nn.Linear), TypeError, "select=.*Linear.*takes patterns, or a function"),
        (lambda: torchprobe.Attention(rows="some"), TypeError, "rows='some': takes a whole number of rows.*not str"),
        (lambda: torchprobe.JsonLinesWriter(5), TypeError, "path=5 is a int: pass the path of a file, such as"),
        (lambda: torchprobe.CheckpointManager(5), TypeError, "directory=5: takes a path, such as .*, not int"),
        (lambda: torchprobe.register_source("outputs", object), ValueError, "name='outputs': .*takes another name"),
        (lambda: torchprobe.register_source(3, object), TypeError, "name=3: takes a name, such as 'inputs', not int"),
    ],
)
def test_a_wrong_call_beside_instrument_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("call", ["flush", "detach"])
@pytest.mark.parametrize(
    ("timeout", "error"), [("soon", TypeError), (True, TypeError), (-1, ValueError), (math.nan, ValueError)]
)
def test_a_wrong_timeout_is_named(call, timeout, error):
    model = mlp()
    with torchprobe.instrument(model, writer=MemoryWriter()) as session:
        with pytest.raises(error, match=f"timeout={timeout!r}: takes .*seconds"):
            getattr(session, call)(timeout)
        assert session.attached


def test_what_is_no_model_is_named(tmp_path):
    manager = torchprobe.CheckpointManager(tmp_path)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    for call in (torchprobe.session_of, manager.save_checkpoint, manager.restore):
        for model in (3, "model", None, optimizer):
            with pytest.raises(TypeError, match=f"(?s)model=.*takes a torch.nn.Module, not {type(model).__name__}"):
                call(model)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ([0, 5, 1], r"targets .*no class of 3 \(0 to 2\)"),
        ([0.0, 0.5, 1.0], "targets hold fractions"),
        ([0, -100, 2], None),
    ],
)
def test_numbers_that_are_no_class_are_said_once(targets, words, caplog):
    user_values._say.cache_clear()
    probs = torch.full((3, 3), 1 / 3)
    for _ in range(2):
        user_values.checked_predictions(probs, torch.tensor(targets))
    assert len(caplog.records) == (words is not None)
    assert words is None or re.search(words, caplog.text)


@pytest.mark.parametrize(
    ("argument", "make", "path"),
    [
        ("log_dir", torchprobe.EventFileWriter, "a\0b"),
        ("log_dir", torchprobe.EventFileWriter, "x" * 300),
        ("path", torchprobe.JsonLinesWriter, "a\0b"),
        ("path", torchprobe.JsonLinesWriter, "x" * 300),
        ("directory", torchprobe.CheckpointManager, "a\0b"),
    ],
)
def test_a_path_that_no_file_system_takes_is_named(argument, make, path):
    with pytest.raises(ValueError, match=f"(?s){argument}='.*takes"):
        make(path)
