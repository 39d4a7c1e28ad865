"""What became of a run: told by its files, whatever ended the program."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
import torch

import torchprobe
from tests import warm
from tests.reports.conftest import write_run
from torchprobe.cli import main
from torchprobe.records import Text

SCRIPT = """
import os, signal, sys, torch, torchprobe, multiprocessing
def train(folder, end, detached):
    model = torch.nn.Linear(8, 1); optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    session = torchprobe.instrument(model, log_dir=folder, every=10)
    for i in range(20):
        optimizer.zero_grad(); model(torch.randn(8, 8)).pow(2).mean().backward(); optimizer.step()
    session.flush()
    exec(end)
    if detached: session.detach()
    return model
if __name__ == "__main__":
    if sys.argv[2].startswith("#worker"):
        process = multiprocessing.get_context("spawn").Process(target=train, args=(sys.argv[1], sys.argv[2], False))
        process.start(); process.join()
    else:
        kept = train(sys.argv[1], sys.argv[2], sys.argv[3] == "detached")
"""


def run(tmp_path: Path, end: str, detached: str = "") -> Path:
    script, folder = tmp_path / "script.py", tmp_path / "run"
    script.write_text(SCRIPT)
    subprocess.run([*warm.python(), str(script), str(folder), end, detached], capture_output=True, timeout=120)
    return folder


def told(folder: Path, capsys) -> dict:
    assert main(["report", str(folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("end", "state", "exception"),
    [
        ("raise ValueError('batch\\n_17_')", "crashed", "ValueError: batch _17_"),
        ("raise KeyboardInterrupt", "interrupted", None),
        ("try: 1 / 0\nexcept ZeroDivisionError: pass", "finished", None),
        ("#worker\nraise ValueError('batch')", "ended", None),
    ],
    ids=["an exception", "Ctrl-C", "an exception that was caught", "in a worker, of which nothing is known"],
)
def test_a_script_without_with_or_detach(tmp_path, capsys, end, state, exception):
    folder = run(tmp_path, end)
    found = told(folder, capsys)
    assert (found["state"], found["exception"], found["steps"]) == (state, exception, 20)
    assert len(found["flight_recordings"]) == (state == "crashed")
    main(["report", str(folder)])
    said = capsys.readouterr().out
    assert (f"Crashed at step 20: {exception}" in said.replace("\n", " ")) == (state == "crashed")


@pytest.mark.parametrize(
    ("error", "state", "exception"),
    [
        (KeyboardInterrupt(), "interrupted", None),
        (SystemExit(0), "finished", None),
        (SystemExit(3), "crashed", "SystemExit: 3"),
        (SystemExit("no data"), "crashed", "SystemExit: no data"),
    ],
    ids=["Ctrl-C", "exit", "exit with an error", "exit with words"],
)
def test_what_leaves_a_with_block(tmp_path, capsys, error, state, exception):
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

    def fail():
        with torchprobe.instrument(model, log_dir=tmp_path / "run"):
            model(torch.randn(8, 8)).sum().backward()
            optimizer.step()
            raise error

    with pytest.raises(type(error)):
        fail()
    found = told(tmp_path / "run", capsys)
    assert (found["state"], found["exception"]) == (state, exception)


def test_a_killed_run_is_running_until_it_has_been_silent_for_long(tmp_path, capsys, monkeypatch):
    folder = run(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    assert told(folder, capsys)["state"] == "running"
    monkeypatch.setattr("torchprobe.reports.summary.time", lambda: time.time() + 3600)
    assert told(folder, capsys)["state"] == "killed"
    main(["report", str(folder)])
    assert "Not finished: killed after step 20" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "state"),
    [
        ([], None),
        (["running", "finished"], "finished"),
        (["running", "crashed: KeyError: 'x'", "running", "finished"], "finished"),
        (["running", "finished", "running"], "killed"),
    ],
    ids=["of another writer", "finished", "gone on after a crash", "gone on and killed"],
)
def test_the_last_word_counts(tmp_path, capsys, words, state):
    values = {"overview/loss": [1.0] * 4, "torchprobe/state": [Text(word) for word in words]}
    assert told(write_run(tmp_path / "run", values), capsys)["state"] == state


def test_a_run_that_was_not_recorded_to_its_end_did_not_finish(tmp_path, capsys):
    stopped = Text("torchprobe stopped recording after this step: ValueError: no")
    values = {"overview/loss": [1.0] * 2, "torchprobe/stopped": [stopped], "torchprobe/state": [None, Text("finished")]}
    assert told(write_run(tmp_path / "run", values), capsys)["state"] == "stopped recording"


def test_an_alert_is_reported_with_what_to_try(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = Text("- loss\\_spike, step 2: high (value 9)\n    - It jumped. Try less (Paper 2020).\n- other, step 2: x")
    values = {"overview/loss": [1.0, 9.0], "alerts/loss_spike": [None, 1.0], "alerts": [None, text]}
    folder = write_run(tmp_path / "run", values)
    [alert] = told(folder, capsys)["alerts"]
    assert (alert["said"], alert["advice"]) == (
        "loss_spike, step 2: high (value 9)",
        "It jumped. Try less (Paper 2020).",
    )
    assert main(["report", str(folder), "--html", str(tmp_path / "x.html")]) == 0
    assert main(["report", str(folder)]) == 0
    for shown in (capsys.readouterr().out, (tmp_path / "x.html").read_text(encoding="utf-8")):
        assert "It jumped. Try less (Paper 2020)." in shown
