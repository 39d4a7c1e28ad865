"""The command line: `torchprobe demo`, `view`, `report`, `compare` and `check`.

Each module has `add_parser(commands)`, which says by what function `(arguments) -> exit code` a command runs. They
import torch, rich and TensorBoard only once the command runs, so that `torchprobe --help` answers at once.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from torchprobe._version import __version__
from torchprobe.cli import check, demo, report, view
from torchprobe.cli.arguments import CommandError

__all__ = ["build_parser", "main"]

_EXAMPLES = """\
examples:
  torchprobe demo                      train a small model for a minute, with everything recorded
  torchprobe view runs/demo            look at what was recorded
  torchprobe check train.py            run a script of yours for 200 steps, and say which training bugs it has
  torchprobe report                    what the newest run says, in the terminal
  torchprobe demo --data aclImdb       the same on texts of yours, one sub-folder a class

In your own training script the same takes one line:
  session = torchprobe.instrument(model, log_dir="runs/mine")
"""

_OUTPUT_ENDS = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_COMMANDS = (demo, view, report, check)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; each command sets `run` to the function that carries it out."""
    parser = _Parser(
        prog="torchprobe",
        description="See attention, uncertainty, gradients and training health of a PyTorch model in TensorBoard.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"torchprobe {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", title="commands", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """As everywhere, but for what an argument may hold that a terminal would obey."""

    def error(self, message: str) -> NoReturn:
        """A wrong option."""
        super().error(_visible(message))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; argv defaults to the process's own arguments.

    0: done. 1: it could not be done, and one line on stderr says why. 130: interrupted.
    Raises SystemExit, as argparse does, after `--help` and `--version` (0) and for a wrong option (2).
    """
    arguments = build_parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names and frames, where they are no UTF-8
    try:
        exit_code: int = arguments.run(arguments)
        print(end="", flush=True)
    except CommandError as error:
        print(f"torchprobe {arguments.command}: error: {_visible(str(error))}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.filename is not None or error.errno not in _OUTPUT_ENDS:
            raise
        if error.errno != errno.EPIPE:  # as `| head` has it
            print(f"torchprobe {arguments.command}: error: cannot write the output: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python still holds, and writes at its end
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return exit_code


def _visible(text: str) -> str:
    from torchprobe.reports.events import visible  # numpy is not needed for --help

    return visible(text)
