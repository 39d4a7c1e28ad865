"""`torchprobe check` runs a script as it is, and says what is wrong with its training."""

from __future__ import annotations

import sys

import pytest

from torchprobe.cli import main

SCRIPT = """
import sys
import torch
import torch.nn.functional as F
from torch import nn
from helper import SIZE

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, SIZE), nn.Linear(SIZE, 3)

    def forward(self, x):
        out = self.b(self.a(x).relu())
        return out.softmax(-1) if "--softmax" in sys.argv else out

if __name__ == "__main__":
    torch.manual_seed(0)
    probe = nn.Linear(2, 2)(torch.ones(1, 2))  # a model that nothing trains
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    x = torch.randn(256, 8)
    y = x[:, :3].argmax(1)
    for i in range(40):
        index = torch.randint(0, 256, (32,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
        if "--fail" in sys.argv and i == 20:
            raise ValueError("the script is broken")
        if "--exit" in sys.argv:
            sys.exit(7)
    print("the script has ended after", i + 1)
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "helper.py").write_text("SIZE = 16\n")
    file = tmp_path / "train.py"
    file.write_text(SCRIPT)
    before = sys.argv, sys.path[:]
    yield str(file)
    assert (sys.argv, sys.path) == before
    sys.modules.pop("helper", None)


def test_a_healthy_script_runs_to_its_end(script, capsys):
    assert main(["check", "--strict", script]) == 0
    out = capsys.readouterr().out
    assert "the script has ended after 40" in out
    assert "torchprobe check: 40 steps, no alerts" in out


def test_a_bug_is_named_with_what_to_do(script, capsys):
    assert main(["check", "--steps", "30", script, "--softmax"]) == 0
    out = capsys.readouterr().out
    assert "the script has ended" not in out
    assert "torchprobe check: 30 steps, 1 alert\n\nsoftmax_before_cross_entropy, step 1:" in out
    assert "Take the softmax away" in out
    assert main(["check", "--strict", "--steps", "12", script, "--softmax"]) == 3


def test_a_script_that_fails_fails_as_it_would(script, capsys):
    assert main(["check", script, "--fail"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):\n  File ")
    assert "ValueError: the script is broken" in err
    assert "runpy" not in err
    assert main(["check", script, "--exit"]) == 7


def test_a_script_without_a_model(tmp_path, capsys):
    file = tmp_path / "empty.py"
    file.write_text("print('nothing')\n")
    assert main(["check", str(file)]) == 1
    assert "no model was called whose parameters a torch.optim optimizer holds" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "absent.py")]) == 1
    assert "is no file" in capsys.readouterr().err


def test_a_script_that_is_instrumented_keeps_its_session(tmp_path, capsys):
    file = tmp_path / "train.py"
    file.write_text(
        "import torch, torchprobe\n"
        "model = torch.nn.Linear(4, 1)\n"
        "optimizer = torch.optim.SGD(model.parameters(), 0.1)\n"
        f"session = torchprobe.instrument(model, log_dir={str(tmp_path / 'run')!r}, every=1)\n"
        "for _ in range(9):\n"
        "    model(torch.randn(8, 4)).square().mean().backward()\n"
        "    optimizer.step()\n"
    )
    assert main(["check", str(file)]) == 0
    assert "missing_zero_grad" in capsys.readouterr().out
    assert list((tmp_path / "run").glob("events*"))
