"""`torchprobe report` and `compare`: what a recorded run says, and what differs between two, biggest first."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchprobe.cli.arguments import CommandError, add_command, positive_int
from torchprobe.writers.files import located

if TYPE_CHECKING:
    from torchprobe.reports.run import Run

_MOST_LISTED = 20
_DESCRIPTION = """\
Tell what a recorded run says: first whether it is healthy and at what to look, then what
that stands on (alerts, final and best, training against validation, the course of its
numbers, layers, attention, calibration, times), then what to try. Given a folder of runs,
it lists them, a line each, and tells of the newest; given several runs, it lists these.
"""

_EXAMPLES = """\
examples:
  torchprobe report                          the newest run below ./runs
  torchprobe report runs/demo --html demo.html
  torchprobe report runs/exp1 --json | jq .alerts
  torchprobe report runs/exp1 --follow       keeps up while the run trains; Ctrl-C ends it
  torchprobe report runs --sort val/loss     every run in a folder, best first
  torchprobe report runs/a runs/b --sort accuracy --descending
  torchprobe report s3://bucket/runs/exp1
"""

_COMPARES = """\
Compare two recorded runs: hyperparameters that differ, and for every number that both have,
where it has settled (median of its last tenth), and by how much the runs differ, biggest
difference first: those of the whole run before those of single layers. Each number is taken
at the last step that both runs have of it, so that a longer run is not ahead.
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
        "runs", nargs="*", type=located, metavar="RUN", help="a run, a folder of runs, or a URL (default: runs)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, for scripts")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with charts that needs nothing else")
    parser.add_argument("--follow", action="store_true", help="keep up with a run that trains")
    parser.add_argument("--sort", metavar="TAG", help="list the runs by the last value of this, such as val/loss")
    parser.add_argument("--descending", action="store_true", help="with --sort: the largest first")
    about = "show what differs between two recorded runs"
    parser = add_command(commands, "compare", run_compare, about=about, description=_COMPARES, examples=_COMPARED)
    parser.add_argument("run_a", type=located, metavar="RUN_A", help="a run, or its URL")
    parser.add_argument("run_b", type=located, metavar="RUN_B", help="another one")
    parser.add_argument("--most", type=positive_int, default=20, metavar="N", help="lines a table (default: 20)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only tags that contain this")


def run(arguments: argparse.Namespace) -> int:
    """Print the report, or write the page. Returns the exit code."""
    from torchprobe.reports.events import visible
    from torchprobe.reports.summary import summarise

    places = arguments.runs or [Path("runs")]
    if arguments.follow:
        return _follow(places, arguments)
    folders = [run for place in places for run in _runs(place)]
    if len(places) > 1 or arguments.sort is not None:
        return _list(folders, arguments)
    found = _recorded(places[0])
    summary = summarise(found)
    if arguments.html is not None:
        _write_page(found, summary, arguments.html)
    if arguments.json:
        print(json.dumps(summary, indent=2, allow_nan=False))
    elif arguments.html is None:
        _print(found, summary, folders)
    else:
        print(f"{visible(str(arguments.html))} shows {visible(str(found.path))}")
    return 0


def _print(found: Run, summary: Mapping[str, Any], folders: Sequence[Path | str]) -> None:
    from rich.console import Console
    from rich.text import Text

    from torchprobe.reports.comparison import runs_table
    from torchprobe.reports.events import visible
    from torchprobe.reports.terminal import rendered

    console = Console()
    console.print(rendered(found, summary))
    if len(folders) > 1:
        latest = folders[-_MOST_LISTED:]
        console.print(runs_table(_rows(latest, None)))
        rest = f"{len(folders) - len(latest)} older ones are not listed. " if len(folders) > len(latest) else ""
        console.print(Text(f"{rest}Above is {visible(str(found.path))}; name another one for its report.", style="dim"))


def _list(folders: Sequence[Path | str], arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from torchprobe.reports.comparison import ordered, runs_table

    if arguments.html is not None:
        raise CommandError("--html: takes one run")
    rows: Sequence[Mapping[str, Any]] = _rows(folders, arguments.sort)
    if arguments.sort is not None:
        if all(row["metric"] is None for row in rows):
            raise CommandError(f"--sort: no run has '{arguments.sort}', or it means several tags; takes a whole tag")
        rows = ordered(rows, descending=arguments.descending)
    if arguments.json:
        print(json.dumps({"runs": rows}, indent=2, allow_nan=False))
    else:
        Console().print(runs_table(rows))
    return 0


def _rows(folders: Sequence[Path | str], metric: str | None) -> list[dict[str, Any]]:
    from torchprobe.reports.comparison import row
    from torchprobe.reports.summary import summarise

    return [row(run, summarise(run), metric) for run in map(_recorded, folders)]


def _follow(places: Sequence[Path | str], arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from torchprobe.reports.terminal import follow

    if len(places) > 1 or isinstance(places[0], str) or arguments.json or arguments.html is not None:
        raise CommandError("--follow: takes one local run, and neither --json nor --html")
    follow(Path(_runs(places[0])[-1]), Console())
    return 0


def _write_page(found: Run, summary: Mapping[str, Any], file: Path) -> None:
    from torchprobe.reports.views import MissingChartsError, page

    try:
        file.write_text(page(found, summary), encoding="utf-8")
    except MissingChartsError as error:
        raise CommandError(f"--html: {error}") from error
    except OSError as error:
        raise CommandError(f"--html: cannot write '{file}': {error.strerror}") from error


def _runs(where: Path | str) -> list[Path | str]:
    """Every run at or below a folder, the newest at the end; a URL is one run. Raises CommandError for none."""
    from torchprobe.reports.run import NoRunError, runs_in

    if isinstance(where, str):
        return [where]
    try:
        return [*runs_in(where)]
    except NoRunError as error:
        raise CommandError(f"{error}. Record a run first: torchprobe demo") from error


def run_compare(arguments: argparse.Namespace) -> int:
    """Print the tables. Returns the exit code."""
    from rich.console import Console

    from torchprobe.reports.comparison import compare, differences

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
