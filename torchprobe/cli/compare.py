"""`torchprobe compare`: what differs between two recorded runs, biggest first."""

from __future__ import annotations

import argparse

from torchprobe.cli.arguments import add_command, place, positive_int, recorded

_DESCRIPTION = """\
Compare two recorded runs: hyperparameters that differ, and for every number that both have,
where it has settled (median of its last tenth), and by how much the runs differ, biggest
difference first: those of the whole run before those of single layers.
"""

_EXAMPLES = """\
examples:
  torchprobe compare runs/lr-0.001 runs/lr-0.01
  torchprobe compare runs/a runs/b --only grad_norm --most 50
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's options to the command line."""
    about = "show what differs between two recorded runs"
    parser = add_command(commands, "compare", run, about=about, description=_DESCRIPTION, examples=_EXAMPLES)
    parser.add_argument("run_a", type=place, metavar="RUN_A", help="a run, or its URL")
    parser.add_argument("run_b", type=place, metavar="RUN_B", help="another one")
    parser.add_argument("--most", type=positive_int, default=20, metavar="N", help="lines a table (default: 20)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only tags that contain this")


def run(arguments: argparse.Namespace) -> int:
    """Print the tables. Returns the exit code."""
    from rich.console import Console

    from torchprobe.reports.comparison import compare, rendered

    a, b = recorded(arguments.run_a), recorded(arguments.run_b)
    Console().print(rendered(a, b, compare(a, b), only=arguments.only, most=arguments.most))
    return 0
