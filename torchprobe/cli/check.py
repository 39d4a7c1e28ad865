"""`torchprobe check`: runs a training script as it is, for some steps, and says what is wrong with its training."""

from __future__ import annotations

import argparse
import contextlib
import os
import runpy
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torchprobe.cli.arguments import CommandError, add_command, positive_int

if TYPE_CHECKING:
    from torchprobe.session import Session

_DESCRIPTION = """\
Run a training script unmodified for some steps, and tell which of the commonest training bugs
it has. The model is found by itself: the first that is called and whose parameters an optimizer
holds. Nothing is written; a script that fails fails as it would.
"""

_EXAMPLES = """\
examples:
  torchprobe check train.py
  torchprobe check --steps 500 train.py --lr 0.1 --epochs 1
  torchprobe check --strict train.py && python train.py
"""

_FOUND = 3  # exit code under --strict


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options to the command line."""
    about = "run a script for some steps and say which training bugs it has"
    parser = add_command(commands, "check", run, about=about, description=_DESCRIPTION, examples=_EXAMPLES)
    parser.add_argument("--steps", type=positive_int, default=200, metavar="N", help="optimizer steps (default: 200)")
    parser.add_argument("--strict", action="store_true", help=f"exit with {_FOUND} when there are alerts (default: 0)")
    parser.add_argument("script", type=Path, metavar="SCRIPT", help="the training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the script")


def run(options: argparse.Namespace) -> int:
    """Run the script and print the verdict. The exit code is the script's, where it ends by itself with one."""
    if not options.script.is_file():
        raise CommandError(f"{options.script} is no file; give the path of a Python script")
    from torchprobe.finding import EnoughSteps, Finder

    code = 0
    with Finder(options.steps) as finder:
        try:
            with _in_place_of(options.script, options.arguments):
                runpy.run_path(str(options.script), run_name="__main__")
        except EnoughSteps:
            pass
        except SystemExit as end:
            code = _code(end)
        except Exception as error:
            traceback.print_exception(_without_ours(error, options.script))
            code = 1
    session = finder.session
    if session is None:
        print("torchprobe check: no model was called whose parameters a torch.optim optimizer holds", file=sys.stderr)
        return code or 1
    session.detach()
    print(verdict(session))
    return code or (_FOUND if options.strict and session.alerts else 0)


def verdict(session: Session) -> str:
    """Alerts of a run with their advice, or that there are none, and what may be meant as it is."""
    from torchprobe.reports.events import visible  # imports numpy

    alerts = [alert for alert in session.alerts if not alert.ended]
    lines = [f"torchprobe check: {session.step} steps, {len(alerts) or 'no'} alert{'s' * (len(alerts) != 1)}"]
    lines += [f"\n{alert}\n    {alert.advice}" for alert in alerts]
    lines += [f"\nremark: {remark}\n    {remark.advice}" for remark in session.remarks]
    return "\n".join(visible(line) for text in lines for line in text.split("\n"))


@contextlib.contextmanager
def _in_place_of(script: Path, arguments: list[str]) -> Iterator[None]:
    """The script's own command line and import path, as `python script.py` gives it."""
    argv, path = sys.argv[:], sys.path[:]
    sys.argv[:] = [str(script), *arguments]
    sys.path[0:1] = [os.fspath(script.resolve().parent)]
    try:
        yield
    finally:
        sys.argv[:], sys.path[:] = argv, path


def _code(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


def _without_ours(error: Exception, script: Path) -> Exception:
    """The error with the traceback that Python would have shown for the script alone."""
    trace = error.__traceback__
    while trace is not None and Path(trace.tb_frame.f_code.co_filename) != script:
        trace = trace.tb_next
    return error.with_traceback(trace) if trace is not None else error
