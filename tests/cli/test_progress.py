from __future__ import annotations

import io

import torch
from rich.console import Console

from torchprobe.cli.bayesian_transformer import Validation
from torchprobe.cli.training import Progress

VALIDATION = Validation(
    accuracy=0.625, loss=1.0, epistemic=0.1, epistemic_right=0.1, epistemic_wrong=0.1, class_accuracy=(0.5, 0.75)
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drive(console: Console) -> str:
    with Progress(console, steps=20) as progress:
        for step in range(1, 21):
            progress.after_step(step, torch.tensor(1.25))
        progress.validated(20, VALIDATION)
    assert progress.completed == 20
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_log_file_gets_plain_lines():
    text = drive(Console(file=io.StringIO(), force_terminal=True))
    assert text.startswith("step 20/20  train loss 1.250  held-out accuracy  62.5%  ")
    assert text.endswith(" s\n")
    assert not {"\x1b", "\r"} & set(text)


def test_a_terminal_gets_a_bar():
    console = Console(file=Terminal(), force_terminal=True, width=120, _environ={"TERM": "xterm"})
    text = drive(console)
    assert "\x1b" in text
    for part in ("20/20", "loss 1.250", "held-out accuracy 62.5%"):
        assert part in text


def test_a_terminal_that_cannot_redraw_gets_lines():
    console = Console(file=Terminal(), force_terminal=True, _environ={"TERM": "dumb"})
    assert not Progress(console, 5).redraws
    capable = Console(file=Terminal(), force_terminal=True, _environ={"TERM": "xterm"})
    assert Progress(capable, 5).redraws
