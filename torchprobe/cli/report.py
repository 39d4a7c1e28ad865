"""`torchprobe report` and `compare`: what a recorded run says, and what differs between two, biggest first."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from torchprobe.cli.arguments import CommandError, add_command, place, positive_int

if TYPE_CHECKING:
    from torchprobe.reports.run import Run

_DESCRIPTION = """\
Tell what a recorded run says: alerts, the course of its numbers, the layers to look at,
attention entropy by layer, calibration and the time that recording took. Given a folder of
runs, it takes the newest.
"""

_EXAMPLES = """\
examples:
  torchprobe report                          the newest run below ./runs
  torchprobe report runs/demo --html demo.html
  torchprobe report runs/exp1 --json | jq .alerts
  torchprobe report s3://bucket/runs/exp1
"""

_COMPARES = """\
Compare two recorded runs: hyperparameters that differ, and for every number that both have,
where it has settled (median of its last tenth), and by how much the runs differ, biggest
difference first: those of the whole run before those of single layers.
"""

_COMPARED = """\
examples:
  torchprobe compare runs/lr-0.001 runs/lr-0.01
  torchprobe compare runs/a runs/b --only grad_norm --most 50
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both commands and their options to the command line."""
    about = "tell what a recorded run says"
    parser = add_command(commands, "report", run, about=about, description=_DESCRIPTION, examples=_EXAMPLES)
    parser.add_argument(
        "run_folder",
        nargs="?",
        type=place,
        default="runs",
        metavar="RUN",
        help="a run or its URL (default: newest in runs)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, for scripts")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots that needs nothing else")
    about = "show what differs between two recorded runs"
    parser = add_command(commands, "compare", run_compare, about=about, description=_COMPARES, examples=_COMPARED)
    parser.add_argument("run_a", type=place, metavar="RUN_A", help="a run, or its URL")
    parser.add_argument("run_b", type=place, metavar="RUN_B", help="another one")
    parser.add_argument("--most", type=positive_int, default=20, metavar="N", help="lines a table (default: 20)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only tags that contain this")


def run(arguments: argparse.Namespace) -> int:
    """Print the report, or write the page. Returns the exit code."""
    from torchprobe.reports.summary import summarise

    found = _recorded(arguments.run_folder)
    summary = summarise(found)
    if arguments.html is not None:
        from torchprobe.reports.page import page

        try:
            arguments.html.write_text(page(found, summary), encoding="utf-8")
        except OSError as error:
            raise CommandError(f"--html: cannot write '{arguments.html}': {error.strerror}") from error
    if arguments.json:
        print(json.dumps(summary, indent=2, allow_nan=False))
    elif arguments.html is None:
        from rich.console import Console

        from torchprobe.reports.terminal import rendered

        Console().print(rendered(found, summary))
    else:
        print(f"{arguments.html} shows {found.path}")
    return 0


def run_compare(arguments: argparse.Namespace) -> int:
    """Print the tables. Returns the exit code."""
    from rich.console import Console

    from torchprobe.reports.terminal import compare, differences

    a, b = _recorded(arguments.run_a), _recorded(arguments.run_b)
    Console().print(differences(a, b, compare(a, b), only=arguments.only, most=arguments.most))
    return 0


def _recorded(where: Path | str) -> Run:
    """The run of a folder or URL. Raises CommandError, in one line, where there is none or it cannot be read."""
    from torchprobe.reports.run import NoRunError, read_run

    try:
        return read_run(where)
    except NoRunError as error:
        raise CommandError(f"{error}. Record a run first: torchprobe demo") from error
    except (OSError, ImportError, ValueError) as error:
        raise CommandError(" ".join(str(error).split())) from error
