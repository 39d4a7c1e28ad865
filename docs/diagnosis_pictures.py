"""Make the pictures of docs/diagnoses.md: `python docs/diagnosis_pictures.py [name ...]`, from the repository's root.

Trains the planted bugs of `tests/diagnoses/sick`, sampled at every step, and draws what a person would see of each: the
loss, and how far a step moves the parameters of each layer. A red line is where the diagnosis was said.
"""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections import defaultdict
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torchprobe
from tests.diagnoses.sick import REMARKS, SICK
from torchprobe.testing import MemoryWriter

FOLDER = Path(__file__).parent / "diagnoses"
WIDTH, HEIGHT, LEFT, TOP = 360, 170, 58, 26
COLOURS = ("#2563eb", "#f59e0b", "#10b981", "#8b5cf6", "#ec4899", "#64748b")
MOST_LINES = len(COLOURS)
Curve = dict[int, float]


def recorded(recipe) -> tuple[dict[str, Curve], dict[str, Curve], dict[str, int]]:
    """The loss and update ratios of a recipe by step, and when each diagnosis was said first."""
    torch.manual_seed(0)
    writer = MemoryWriter()
    session = recipe(lambda model: torchprobe.instrument(model, writer=writer, every=1))
    session.detach()
    losses, moves = {}, defaultdict(dict)
    for tag in writer.tags():
        where = tag.partition("/")[2]
        if tag == "overview/loss":
            losses["loss"] = dict(writer.scalars(tag))
        elif tag.startswith("update_ratio/"):
            moves[where] = dict(writer.scalars(tag))
    said = {}
    for one in reversed([*session.alerts, *session.remarks]):
        said[one.rule] = one.step
    return losses, moves, said


def panel(
    draw: ImageDraw.ImageDraw, left: int, title: str, curves: dict[str, Curve], said: int | None, log: bool
) -> None:
    """Curves over steps; a value that has no place on the axis ends a line."""
    font = ImageFont.load_default(11)
    x0, x1, y0, y1 = left + LEFT, left + WIDTH - 12, TOP, HEIGHT - 22
    draw.text((x0, 6), title, fill="black", font=font)
    draw.rectangle((x0, y0, x1, y1), outline="#cbd5e1")
    shown = {
        name: {s: v for s, v in curve.items() if math.isfinite(v) and (v > 0 or not log)}
        for name, curve in curves.items()
    }
    values = [v for curve in shown.values() for v in curve.values()]
    steps = [s for curve in curves.values() for s in curve]
    if not values:
        draw.text((x0 + 8, y0 + 8), "nothing moves" if steps else "no values", fill="#64748b", font=font)
        return
    scaled = math.log10 if log else float
    low, high = scaled(min(values)), scaled(max(values))
    high = high if high > low else low + (abs(low) or 1.0) * 0.1
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def at(step: int, value: float) -> tuple[float, float]:
        return x0 + (x1 - x0) * (step - first) / (last - first), y1 - 4 - (y1 - y0 - 8) * (scaled(value) - low) / (
            high - low
        )

    for curve, colour in zip(list(shown.values())[:MOST_LINES], COLOURS, strict=False):
        draw.line([at(*point) for point in sorted(curve.items())], fill=colour, width=2)
    for value, y in ((max(values), y0), (min(values), y1 - 12)):
        draw.text((x0 - 6, y), f"{value:.3g}", fill="#334155", font=font, anchor="ra")
    draw.text((x0, y1 + 5), str(first), fill="#334155", font=font)
    draw.text((x1, y1 + 5), f"step {last}", fill="#334155", font=font, anchor="ra")
    if said is not None:
        x = at(said, values[0])[0]
        draw.line((x, y0, x, y1), fill="#dc2626", width=1)


def picture(rule: str, recipe) -> Image.Image:
    losses, moves, said = recorded(recipe)
    canvas = Image.new("RGB", (2 * WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(canvas)
    panel(draw, 0, "overview/loss", losses, said.get(rule), log=False)
    panel(draw, WIDTH, "update_ratio/ by parameter, log axis", moves, said.get(rule), log=True)
    return canvas.quantize(32)


def main(names: list[str]) -> None:
    logging.disable()
    warnings.simplefilter("ignore")
    first: dict[str, object] = {}
    for rule, recipe in (*SICK.values(), *REMARKS.values()):
        first.setdefault(rule, recipe)
    for rule, recipe in first.items():
        if not names or rule in names:
            picture(rule, recipe).save(FOLDER / f"{rule}.png", optimize=True)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    main(sys.argv[1:])
