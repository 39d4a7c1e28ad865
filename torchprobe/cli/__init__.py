"""The command line: `torchprobe demo`, `view`, `report`, `compare` and `check`.

Each module has `add_parser(commands)`, which says by what function `(arguments) -> exit code` a command runs. They
import torch, rich and TensorBoard only once the command runs, so that `torchprobe --help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

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

_COMMANDS = (demo, view, report, check)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; each command sets `run` to the function that carries it out."""
    parser = argparse.ArgumentParser(
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; argv defaults to the process's own arguments.

    0: done. 1: it could not be done, and one line on stderr says why. 130: interrupted.
    Raises SystemExit, as argparse does, after `--help` and `--version` (0) and for a wrong option (2).
    """
    arguments = build_parser().parse_args(argv)
    try:
        exit_code: int = arguments.run(arguments)
    except CommandError as error:
        from torchprobe.reports.events import visible  # numpy is not needed for --help

        print(f"torchprobe {arguments.command}: error: {visible(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return exit_code
