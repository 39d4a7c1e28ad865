from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

import torchprobe
from tests.reports.conftest import write_run
from torchprobe.cli import build_parser, main


def commands() -> dict[str, argparse.ArgumentParser]:
    action = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def options() -> list[tuple[str, argparse.Action]]:
    return [(name, action) for name, parser in commands().items() for action in parser._actions]


def test_help_lists_the_commands_and_shows_examples(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for expected in ("demo ", "view ", "--version", "examples:", 'torchprobe.instrument(model, log_dir="runs/mine")'):
        assert expected in text


def test_version(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"torchprobe {torchprobe.__version__}\n"


@pytest.mark.parametrize("command", ["demo", "view"])
def test_every_option_of_a_command_is_explained_with_its_default(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"examples: torchprobe {command}" in text
    for name, action in options():
        if name == command:
            assert action.help, action
            assert all(option in text for option in action.option_strings)
            if action.default not in (None, False, argparse.SUPPRESS):
                assert f"(default: {str(action.default).replace(chr(92), '/')})" in action.help


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    assert "usage: torchprobe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--steps", "0"], "argument --steps: takes a whole number of at least 1, got '0'"),
        (["demo", "--steps", "many"], "argument --steps: takes a whole number of at least 1, got 'many'"),
        (["demo", "--steps", "5", "--epochs", "1"], "argument --epochs: not allowed with argument --steps"),
        (["demo", "--dropout", "1"], "argument --dropout: takes a number from 0 to below 1, got '1'"),
        (["demo", "--learning-rate", "inf"], "argument --learning-rate: takes a number above 0, got 'inf'"),
        (["demo", "--learning-rate", "x"], "argument --learning-rate: takes a number, got 'x'"),
        (["demo", "--seed", "-1"], "argument --seed: takes a whole number, 0 to 4294967295, got '-1'"),
        (["view", "--port", "65536"], "argument --port: takes a whole number, 1 to 65535, got '65536'"),
    ],
)
def test_a_wrong_option_says_what_it_takes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_help_is_fast_because_nothing_heavy_is_imported():
    script = (
        "import sys\n"
        "from torchprobe.cli import main\n"
        "try: main(['demo', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'rich', 'tensorboard', 'numpy', 'PIL'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_python_dash_m_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "torchprobe", "--version"], capture_output=True, text=True)
    assert done.stdout == f"torchprobe {torchprobe.__version__}\n"
    assert done.returncode == 0


@pytest.mark.parametrize("command", ["report", "report --json", "compare"])
def test_an_output_that_takes_no_more_costs_no_traceback(command, tmp_path):
    write_run(tmp_path / "grün", {"train/loss": [1.0, 2.0]})
    run = str(tmp_path / "grün")
    arguments = [*command.split(), run, *([run] if command == "compare" else [])]
    call = [sys.executable, "-m", "torchprobe", *arguments]
    plain = subprocess.run(call, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (plain.returncode, plain.stderr) == (0, "")
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(call, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, "")
    if Path("/dev/full").exists():
        with Path("/dev/full").open("w") as full:
            lost = subprocess.run(call, stdout=full, stderr=subprocess.PIPE, text=True)
        assert lost.returncode == 1
        assert len(lost.stderr.splitlines()) == 1
        assert "cannot write the output" in lost.stderr
