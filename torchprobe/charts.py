"""Curves and bars for TensorBoard's Images page, drawn with Pillow in the drain thread."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchprobe.records import Image

WIDTH = 320  # pixels: TensorBoard shows no picture wider without scaling it down
_LEFT, _TOP, _SIDE = 40, 34, 264  # of the plot, which is this wide
_HEIGHT = 190
_BLUE, _RED, _GREEN = (33, 102, 172), (214, 96, 77), (127, 188, 65)
_GREY, _PALE = (140, 140, 140), (232, 232, 232)

Curve = Mapping[str, NDArray[np.float64]]


class _Plot:
    """Axes from 0 to 1, and from 0 to `top` upwards, with grid and labels; points are in their units."""

    def __init__(self, title: str, x: str, y: str, *, top: float = 1.0, below: int = 0) -> None:
        from PIL import Image as Pillow
        from PIL import ImageDraw

        self._top = top
        self._foot = _TOP + _HEIGHT
        self._canvas = Pillow.new("RGB", (WIDTH, self._foot + 28 + below), "white")
        self.draw = ImageDraw.Draw(self._canvas)
        for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
            across, down = self.at(tick, tick * top)
            self.draw.line((_LEFT, down, _LEFT + _SIDE, down), fill=_PALE)
            self.draw.line((across, _TOP, across, self._foot), fill=_PALE)
            self.write((across, self._foot + 2), f"{tick:g}", anchor="ma")
            self.write((_LEFT - 4, down), f"{tick * top:g}", anchor="rm")
        self.write((_LEFT, 3), title, size=12)
        self.write((_LEFT + _SIDE, self._foot + 14), x, anchor="ra")
        self.write((_LEFT, 19), y)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The pixel of a point."""
        return _LEFT + x * _SIDE, self._foot - y / self._top * _HEIGHT

    def bar(self, left: float, right: float, low: float, high: float, **paint: Any) -> None:
        """A rectangle, whichever of low and high is larger, if they differ; one pixel apart from its neighbour."""
        (x0, y0), (x1, y1) = self.at(left, max(low, high)), self.at(right, min(low, high))
        if y1 > y0:
            self.draw.rectangle((x0 + 1, y0, max(x0 + 1, x1 - 1), y1), **paint)

    def line(self, points: Iterable[tuple[float, float]], fill: tuple[int, int, int] = _BLUE, width: int = 2) -> None:
        """Straight lines between points."""
        pixels = [self.at(x, y) for x, y in points]
        if len(pixels) == 1:
            x, y = pixels[0]
            self.draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=fill)
        self.draw.line(pixels, fill=fill, width=width)

    def dashes(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """A dashed grey line: what would be right."""
        points = np.linspace(start, end, 40)
        for a, b in zip(points[::2], points[1::2], strict=True):
            self.draw.line((*self.at(*a), *self.at(*b)), fill=_GREY)

    def write(self, at: tuple[float, float], text: str, *, size: int = 10, anchor: str = "la") -> None:
        """Text in pixels."""
        self.draw.text(at, text, fill="black", font=_font(size), anchor=anchor)

    def image(self) -> Image:
        """What was drawn."""
        return Image(np.asarray(self._canvas, dtype=np.uint8))


def reliability_diagram(curve: Curve, title: str = "reliability") -> Image:
    """Accuracy of each bin of confidence against its mean confidence, and below how many predictions each bin has.

    curve: lower, upper, confidence, accuracy, count of the non-empty bins. Above the blue is the gap between the two:
    red where confidence is the higher end, green where accuracy is.
    """
    strip = 34
    plot = _Plot(title, "confidence", "accuracy (red: too confident, green: too modest)", below=strip + 12)
    most = max(curve["count"].max(initial=0.0), 1.0)
    foot = plot.at(0, 0)[1] + 28 + strip
    columns = (curve[name].tolist() for name in ("lower", "upper", "confidence", "accuracy", "count"))
    for lower, upper, confidence, accuracy, count in zip(*columns, strict=True):
        plot.bar(lower, upper, 0.0, accuracy, fill=_BLUE)
        plot.bar(lower, upper, accuracy, confidence, fill=_RED if confidence > accuracy else _GREEN)
        left, right = plot.at(lower, 0)[0], plot.at(upper, 0)[0]
        plot.draw.rectangle((left + 1, foot - (strip - 10) * count / most, max(left + 1, right - 1), foot), fill=_GREY)
        plot.write(((left + right) / 2, foot + 1), _short(count), size=8, anchor="ma")
    plot.dashes((0, 0), (1, 1))
    plot.write((_LEFT - 4, foot), "n", anchor="rs")
    return plot.image()


def precision_recall_curve(curve: Curve, title: str = "precision and recall") -> Image:
    """Precision over recall; dashed the share of positives, which is what chance gives."""
    plot = _Plot(title, "recall", "precision")
    recall, precision = curve["recall"], curve["precision"]
    plot.dashes((0, float(precision[-1])), (1, float(precision[-1])))
    plot.line(zip(recall.tolist(), precision.tolist(), strict=True))
    return plot.image()


def risk_coverage_curve(curve: Curve, title: str = "accuracy when the uncertain are refused") -> Image:
    """Accuracy of the predictions that are kept over their share; dashed the accuracy of all."""
    plot = _Plot(title, "share kept, most certain first", "accuracy")
    coverage, accuracy = curve["coverage"], curve["accuracy"]
    plot.dashes((0, float(accuracy[-1])), (1, float(accuracy[-1])))
    plot.line(zip(coverage.tolist(), accuracy.tolist(), strict=True))
    return plot.image()


def pit_chart(edges: NDArray[np.float64], counts: NDArray[np.int64], title: str = "PIT of the targets") -> Image:
    """Targets in each bin of the probability integral transform, relative to even shares (dashed).

    Heaped in the middle: predicted variances are too large; at both ends: too small; to one side: a biased mean.
    """
    shares = counts * len(counts) / max(counts.sum(), 1)
    plot = _Plot(title, "predicted probability below the target", "targets, 1 is even", top=max(2.0, ceil(max(shares))))
    for left, right, share in zip(edges[:-1].tolist(), edges[1:].tolist(), shares.tolist(), strict=True):
        plot.bar(left, right, 0.0, share, fill=_BLUE)
    plot.dashes((0, 1), (1, 1))
    return plot.image()


def _short(count: float) -> str:
    """At most four characters: 999, 1.2k, 12k, 3M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.1f}{name}" if count < 9.95 * unit else f"{count / unit:.0f}{name}"
    return f"{count:.0f}"


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)
