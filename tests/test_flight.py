"""The flight recorder: a file with the evidence, when something goes wrong."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

import torchprobe
from tests.models import inputs, mlp
from torchprobe import flight
from torchprobe.random_state import random_state, set_random_state
from torchprobe.writers.files import LocalPlace


def train(session, model, steps, poison=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(1, steps + 1):
        loss = model(inputs("mlp")).square().mean()
        optimizer.zero_grad()
        (loss * (float("nan") if step == poison else 1.0)).backward()
        optimizer.step()


def recordings(path) -> dict[str, dict]:
    def no_constant(name):
        raise AssertionError(f"{name} is no JSON")

    return {p.name: json.loads(p.read_text(), parse_constant=no_constant) for p in (path / "flight").glob("*")}


def test_an_alert_leaves_the_last_sampled_steps_in_one_file(tmp_path):
    model = mlp()
    with torchprobe.instrument(model, log_dir=tmp_path, every=2, rules=["non_finite"]) as session:
        train(session, model, 9, poison=8)
    [(name, found)] = recordings(tmp_path).items()
    assert name == "8.json"
    assert (found["step"], found["reason"], found["exception"]) == (8, "alert", None)
    assert [alert["rule"] for alert in found["alerts"]] == ["non_finite"]
    assert [record["step"] for record in found["records"]] == [1, 2, 4, 6, 8]
    assert found["records"][-1]["values"]["grad_nonfinite/0"] > 0
    assert found["versions"]["torch"] == str(torch.__version__)
    assert {tuple(step["shapes"]["0"]) for step in found["steps"] if step["shapes"]} == {(6, 4)}


def test_an_exception_in_the_loop_is_recorded_and_goes_on(tmp_path):
    model = mlp()

    def loop():
        with torchprobe.instrument(model, log_dir=tmp_path, every=2, rules=[]) as session:
            train(session, model, 5)
            raise KeyError("batch")

    with pytest.raises(KeyError, match="batch"):
        loop()
    [(name, found)] = recordings(tmp_path).items()
    assert (name, found["reason"], found["alerts"]) == ("5.json", "exception", [])
    assert "KeyError: 'batch'" in found["exception"]
    assert len(found["records"]) == 4  # 1, 2, 4, and the last one


@pytest.mark.parametrize("number", [np.float32(0.5), np.int64(3), torch.tensor(0.5)])
def test_an_alert_with_numbers_of_numpy_or_torch_is_recorded(tmp_path, number):
    model = mlp()
    rule = lambda record: torchprobe.Alert("mine", np.int64(record.step), 7, number, number, "m")  # noqa: E731
    with torchprobe.instrument(model, log_dir=tmp_path, every=2, rules=[rule]) as session:
        train(session, model, 3)
    [found] = recordings(tmp_path).values()
    [alert] = found["alerts"]
    assert (alert["step"], alert["value"], alert["threshold"]) == (1, float(number), float(number))
    assert str(session.alerts[0]).startswith("mine, step 1 at 7: m")


def test_a_healthy_run_and_a_foreign_writer_leave_no_file(tmp_path):
    model = mlp()
    with torchprobe.instrument(model, log_dir=tmp_path, every=2) as session:
        train(session, model, 5)
    assert not (tmp_path / "flight").exists()


def test_the_number_of_files_is_bounded(tmp_path):
    recorder = flight.FlightRecorder(LocalPlace(tmp_path), list, size=3)
    for step in range(50):
        record = torchprobe.Record(step, 0.0, {"x": float("nan")}, sampled=True)
        recorder.follow(record, [torchprobe.Alert("mine", step, None, 1.0, None, "m")])
    assert len(list(tmp_path.glob("*"))) == flight.MAX_FILES
    content = json.loads((tmp_path / "19.json").read_text())
    assert [record["values"] for record in content["records"]] == [{"x": "NaN"}] * 3


def test_a_full_disk_is_said_once(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    recorder = flight.FlightRecorder(LocalPlace(tmp_path / "file" / "flight"), list)
    for step in range(2):
        recorder.follow(torchprobe.Record(step, 0.0, {}), [torchprobe.Alert("mine", step, None, 1.0, None, "m")])
    assert len(caplog.records) == 1


def test_the_random_state_comes_back_from_json_and_is_not_changed_by_looking():
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    random.gauss(0, 1)
    state = json.loads(json.dumps(random_state()))
    draws = [random.gauss(0, 1), random.random(), np.random.rand(), torch.rand(2).tolist()]
    set_random_state(state)
    assert [random.gauss(0, 1), random.random(), np.random.rand(), torch.rand(2).tolist()] == draws
