"""`torchprobe report`: what a recorded run says, in the terminal, as JSON or as a page."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from torchprobe.cli.arguments import CommandError, add_command, place, recorded

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


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's options to the command line."""
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


def run(arguments: argparse.Namespace) -> int:
    """Print the report, or write the page. Returns the exit code."""
    from torchprobe.reports.summary import summarise

    found = recorded(arguments.run_folder)
    summary = summarise(found)
    if arguments.html is not None:
        from torchprobe.reports.page import page

        _write(arguments.html, page(found, summary))
    if arguments.json:
        print(json.dumps(summary, indent=2, allow_nan=False))
    elif arguments.html is None:
        from rich.console import Console

        from torchprobe.reports.terminal import rendered

        Console().print(rendered(found, summary))
    else:
        print(f"{arguments.html} shows {found.path}")
    return 0


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"--html: cannot write '{file}': {error.strerror}") from error
