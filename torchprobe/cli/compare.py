"""`torchprobe compare`: what differs between two recorded runs, biggest first."""

from __future__ import annotations

import argparse
from pathlib import Path

from torchprobe.cli.arguments import positive_int
from torchprobe.cli.errors import CommandError

_DESCRIPTION = """\
Compare two recorded runs: for every number that both have, where it has settled (median of
its last tenth), and by how much the runs differ, biggest difference first.
"""

_EXAMPLES = """\
examples:
  torchprobe compare runs/lr-0.001 runs/lr-0.01
  torchprobe compare runs/a runs/b --only grad_norm --most 50
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's options to the command line."""
    parser = commands.add_parser(
        "compare",
        help="show what differs between two recorded runs",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("run_a", type=Path, metavar="RUN_A", help="a run")
    parser.add_argument("run_b", type=Path, metavar="RUN_B", help="another one")
    parser.add_argument("--most", type=positive_int, default=20, metavar="N", help="lines to show (default: 20)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only tags that contain this")


def run(arguments: argparse.Namespace) -> int:
    """Print the table. Returns the exit code."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from torchprobe.reports.comparison import compare
    from torchprobe.reports.run import NoRunError, read_run
    from torchprobe.reports.terminal import short

    try:
        a, b = read_run(arguments.run_a), read_run(arguments.run_b)
    except NoRunError as error:
        raise CommandError(f"{error}. Record a run first: torchprobe demo") from error
    compared = compare(a, b)
    shown = [found for found in compared.differences if arguments.only in found.tag and found.size > 0]
    table = Table(title=f"{a.path} against {b.path}", title_justify="left", show_edge=False)
    for name, justify in (("tag", "left"), ("first run", "right"), ("second run", "right"), ("difference", "right")):
        table.add_column(name, justify="right" if justify == "right" else "left")
    for found in shown[: arguments.most]:
        table.add_row(escape(found.tag), short(found.a), short(found.b), f"{found.size:.1%}")
    console = Console()
    console.print(table)
    if len(shown) > arguments.most:
        console.print(f"{len(shown) - arguments.most} smaller differences are not shown; --most shows them.")
    for path, tags in ((a.path, compared.only_a), (b.path, compared.only_b)):
        if tags:
            rest = ", …" if len(tags) > 5 else ""
            console.print(f"Only in {path}: {', '.join(tags[:5])}{rest} ({len(tags)} tags)", markup=False)
    return 0
