"""Keeps what pytest-benchmark measured, and makes from it the README's table and a plot.

    python -m benchmarks.tables peers.json     # as `--benchmark-json=peers.json` left it; several files may be given

Writes `benchmarks/results/peers.json` (the machine, and a line a measurement: later ones replace those of the same
recipe and peer), `benchmarks/results/peers.png`, and the tables between the marks in README.md and, of compiled models,
in docs/cost.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "peers.json"
PAGES = {ROOT / "README.md": False, ROOT / "docs" / "cost.md": True}
"""Whether the table of a page is that of compiled models."""

BEGIN, END = "<!-- made by benchmarks/tables.py -->", "<!-- end -->"
OTHER = "†"  # after what another machine measured
KEPT = ("recipe", "peer", "ratio", "error", "bare_ms", "added_ms", "blocks", "clock")


def kept(report: Mapping[str, Any]) -> dict[str, Any]:
    """The machine and the measurements of one run of pytest-benchmark."""
    info = report["machine_info"]
    cpu = info.get("cpu", {})
    name = cpu.get("brand_raw") or info.get("processor") or info.get("machine")
    measured = [bench["extra_info"] for bench in report["benchmarks"] if bench["extra_info"]]
    torch = measured[0]["torch"] if measured else "?"
    machine = f"{cpu.get('count', '?')} cores, {name}; torch {torch}, Python {info['python_version']}"
    found = [{key: one[key] for key in KEPT} for one in measured]
    return {"machine": machine, "date": report["datetime"][:10], "measurements": found}


def merged(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Later measurements in place of earlier ones of the same; those that stay know which machine they are of."""
    kept = [{"machine": before["machine"], **one} for one in before.get("measurements", ())]
    both = {(one["recipe"], one["peer"]): one for one in (*kept, *after["measurements"])}
    return {**after, "measurements": [_plain(one, after["machine"]) for one in both.values()]}


def _plain(one: Mapping[str, Any], machine: str) -> dict[str, Any]:
    return {key: value for key, value in one.items() if (key, value) != ("machine", machine)}


def table(results: Mapping[str, Any], compiled: bool = False) -> str:
    """A row a peer, a column a recipe: the ratio and its standard error."""
    wanted = [one for one in results["measurements"] if one["recipe"].endswith("compiled") == compiled]
    measured = {(one["peer"], one["recipe"]): one for one in wanted}
    columns = {one["recipe"]: one for one in wanted}
    recipes = list(columns)
    head = ["at every step", *map(_heading, columns.values())]
    peers = dict.fromkeys(one["peer"] for one in wanted)
    rows = [[peer, *(_cell(measured.get((peer, recipe))) for recipe in recipes)] for peer in peers]
    return "\n".join(_row(cells) for cells in (head, ["---"] * len(head), *rows))


def _heading(one: Mapping[str, Any]) -> str:
    clock = " of CPU time" if one.get("clock") == "cpu" else ""
    return f"{one['recipe']} ({_milliseconds(one['bare_ms'])} ms{clock})"


def _cell(one: Mapping[str, Any] | None) -> str:
    return "" if one is None else f"{one['ratio']:.2f} ± {one['error']:.2f}{' ' + OTHER if 'machine' in one else ''}"


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def put(text: str, results: Mapping[str, Any], compiled: bool = False) -> str:
    """A page with the table between its marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    rows = table(results, compiled)
    others = sorted({one["machine"] for one in results["measurements"] if "machine" in one}) if OTHER in rows else []
    notes = "".join(f" {OTHER} {machine}." for machine in others)
    measured = f"{rows}\n\nMeasured on {results['machine']}, {results['date']}.{notes}"
    return f"{before}{BEGIN}\n\n{measured}\n\n{END}{after}"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Added time beside the bare step, a group of bars a recipe."""
    from PIL import Image, ImageDraw

    recipes = [*dict.fromkeys(one["recipe"] for one in results["measurements"])]
    rows = [one for one in results["measurements"] if one["ratio"] > 1]
    rows.sort(key=lambda one: recipes.index(one["recipe"]))
    height, left, width = 18, 420, 1000
    most = max(one["ratio"] - 1 for one in rows)
    picture = Image.new("RGB", (width, height * (len(rows) + 1)), "white")
    draw = ImageDraw.Draw(picture)
    for i, one in enumerate(rows):
        length = (width - left - 80) * (one["ratio"] - 1) / most
        ours = "torchprobe" in one["peer"]
        draw.text((8, i * height + 4), f"{one['recipe']}: {one['peer']}", fill="black")
        draw.rectangle(
            (left, i * height + 3, left + length, (i + 1) * height - 3), fill="#2563eb" if ours else "#9ca3af"
        )
        draw.text((left + length + 6, i * height + 4), f"+{100 * (one['ratio'] - 1):.0f} %", fill="black")
    picture.save(path)


def main(files: Sequence[str]) -> None:
    """Merge, write and draw."""
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for file in files:
        results = merged(results, kept(json.loads(Path(file).read_text())))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    plot(results, RESULTS.with_suffix(".png"))
    for page, compiled in PAGES.items():
        page.write_text(put(page.read_text(), results, compiled))


if __name__ == "__main__":
    main(sys.argv[1:])
