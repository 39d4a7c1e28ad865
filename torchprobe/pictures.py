"""Pictures for TensorBoard's Images page, drawn with Pillow in the drain thread: matrices, curves and bars."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from torchprobe.records import Image

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from PIL.ImageDraw import ImageDraw

TILE = 320  # pixels: TensorBoard shows no picture wider without scaling it down
_LEFT, _HEAD, _FOOT = 34, 36, 30  # room for row numbers, for the title and for column numbers
_BAR, _BAR_ROOM, _GAP = 10, 54, 8  # the colour bar, the bar with its numbers, between pictures
_SIDES = {1: 256, 2: 256, 4: 128}  # of a grid's pictures, by columns: the whole stays within two tiles
_ROUND: list[int] = [digit * 10**power for power in range(12) for digit in (1, 2, 5)]
_NOTHING = (225, 225, 225)  # a cell without a value
# Viridis at five points: it reads in print and for colour-blind people.
_STOPS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float64)


def heat_map(matrix: NDArray[np.float64], *, rows: str, columns: str, title: str = "") -> Image:
    """A labelled picture of a matrix with a colour bar, at most `TILE` pixels wide.

    matrix: shape (rows, columns); NaN cells are grey. rows, columns: what the axes are. At the ends of the colour bar
    are the smallest and the largest value there are.
    """
    finite = matrix[np.isfinite(matrix)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    pixels = enlarged(coloured(matrix, low, high), TILE - _LEFT - _GAP - _BAR_ROOM)
    height, width = pixels.shape[:2]
    foot = _HEAD + max(height, 70)
    canvas, draw = _blank(TILE, foot + _FOOT, title)
    _write(draw, (2, 19), f"{rows} down, {columns} across")
    _put(canvas, pixels, (_LEFT, _HEAD))
    _numbers_down(draw, (_LEFT, _HEAD), height, matrix.shape[0])
    _numbers_across(draw, (_LEFT, _HEAD + height), width, matrix.shape[1])
    _colour_bar(canvas, draw, (TILE - _BAR_ROOM, _HEAD), foot - _HEAD, low, high)
    return Image(np.asarray(canvas, dtype=np.uint8))


def grid(
    tiles: Sequence[NDArray[np.float64]], titles: Sequence[str], *, title: str = "", axes: str = "", high: float = 1.0
) -> Image:
    """Several matrices of one shape side by side, each with its title, on one colour scale from 0 to `high`.

    One or two are 256 pixels wide, more than four stand in columns of four and are 128 wide: the whole is at most
    `2 * TILE` wide. axes: what goes down and across. Rows are numbered at the left of a line, columns below it.
    """
    columns = min(len(tiles), 2) if len(tiles) <= 4 else 4
    side, lines = _SIDES[columns], -(-len(tiles) // columns)
    cells = [enlarged(coloured(tile, 0.0, high), side) for tile in tiles]
    height, width = cells[0].shape[:2]
    down, tall = _HEAD + 16, height + 16 + 20
    right = _LEFT + columns * (max(width, 60) + _GAP)
    canvas, draw = _blank(max(right + _BAR_ROOM, TILE), down + lines * tall, title)
    _write(draw, (2, 19), axes)
    for i, (cell, name) in enumerate(zip(cells, titles, strict=True)):
        left, top = _LEFT + i % columns * (max(width, 60) + _GAP), down + i // columns * tall
        _write(draw, (left, top - 15), name)
        _put(canvas, cell, (left, top))
        _numbers_across(draw, (left, top + height), width, tiles[i].shape[1])
        if left == _LEFT:
            _numbers_down(draw, (left, top), height, tiles[i].shape[0])
    _colour_bar(canvas, draw, (right, down), max(height, 70), 0.0, high)
    return Image(np.asarray(canvas, dtype=np.uint8))


def coloured(matrix: NDArray[np.float64], low: float, high: float) -> NDArray[np.uint8]:
    """Colours of a matrix's cells: shape (rows, columns, 3)."""
    share = (matrix - low) / (high - low if high > low else 1.0)  # np.interp keeps to the ends
    colours = np.stack([np.interp(share, np.linspace(0.0, 1.0, len(_STOPS)), channel) for channel in _STOPS.T], axis=-1)
    pixels: NDArray[np.uint8] = np.where(np.isfinite(matrix)[..., None], colours, _NOTHING).round().astype(np.uint8)
    return pixels


def enlarged(pixels: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Whole-number enlargement to at most `width`, so that cells stay sharp; larger ones are pooled by striding."""
    rows, columns = pixels.shape[:2]
    if max(rows, columns) > width:
        step = -(-max(rows, columns) // width)
        return pixels[::step, ::step]
    factor = max(1, width // max(rows, columns))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def _blank(width: int, height: int, title: str = "") -> tuple[Picture, ImageDraw]:
    from PIL import Image as Pillow
    from PIL import ImageDraw

    canvas = Pillow.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    _write(draw, (2, 2), title, size=13)
    return canvas, draw


def _put(canvas: Picture, pixels: NDArray[np.uint8], at: tuple[int, int]) -> None:
    from PIL import Image as Pillow

    canvas.paste(Pillow.fromarray(pixels), at)


def _write(draw: ImageDraw, at: tuple[float, float], text: str, *, anchor: str = "la", size: int = 11) -> None:
    draw.text(at, text, fill="black", font=_font(size), anchor=anchor)


@cache  # decoding it takes as long as a line of text, and it keeps the glyphs that it has drawn
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _numbers_down(draw: ImageDraw, at: tuple[int, int], height: int, count: int) -> None:
    for i in range(0, count, _spacing(count, height, 14)):
        y = at[1] + (i + 0.5) * height / count
        draw.line((at[0] - 4, y, at[0] - 1, y), fill="black")
        _write(draw, (at[0] - 6, y), str(i), anchor="rm")


def _numbers_across(draw: ImageDraw, at: tuple[int, int], width: int, count: int) -> None:
    for i in range(0, count, _spacing(count, width, 26)):
        x = at[0] + (i + 0.5) * width / count
        draw.line((x, at[1], x, at[1] + 3), fill="black")
        _write(draw, (x, at[1] + 4), str(i), anchor="ma")


def _spacing(count: int, length: int, least: int) -> int:
    """Cells between two numbers that stand at least `least` pixels apart: 1, 2, 5, 10, 20, …"""
    return next(n for n in _ROUND if n * length >= least * count)


def _colour_bar(canvas: Picture, draw: ImageDraw, at: tuple[int, int], height: int, low: float, high: float) -> None:
    left, top = at
    ramp = coloured(np.linspace(1.0, 0.0, height)[:, None].repeat(_BAR, axis=1), 0.0, 1.0)
    _put(canvas, ramp, (left, top))
    for share, anchor in ((0.0, "la"), (0.5, "lm"), (1.0, "ld")):
        value = high - share * (high - low)
        _write(draw, (left + _BAR + 3, top + share * height), f"{value:.3g}", anchor=anchor)


_ORIGIN, _SIDE, _HEIGHT = (40, 34), 264, 190  # of a plot: where it begins, its width and its height
_BLUE, _RED, _GREEN = (33, 102, 172), (214, 96, 77), (127, 188, 65)
_GREY, _PALE = (140, 140, 140), (232, 232, 232)

Curve = Mapping[str, NDArray[np.float64]]


class _Plot:
    """Axes from 0 to 1, and from 0 to `top` upwards, with grid and labels; points are in their units."""

    def __init__(self, title: str, x: str, y: str, *, top: float = 1.0, below: int = 0) -> None:
        left, ceiling = _ORIGIN
        self._top = top
        self._foot = ceiling + _HEIGHT
        self._canvas, self.draw = _blank(TILE, self._foot + 28 + below)
        for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
            across, down = self.at(tick, tick * top)
            self.draw.line((left, down, left + _SIDE, down), fill=_PALE)
            self.draw.line((across, ceiling, across, self._foot), fill=_PALE)
            self.write((across, self._foot + 2), f"{tick:g}", anchor="ma")
            self.write((left - 4, down), f"{tick * top:g}", anchor="rm")
        self.write((left, 3), title, size=12)
        self.write((left + _SIDE, self._foot + 14), x, anchor="ra")
        self.write((left, 19), y)

    def at(self, x: float, y: float) -> tuple[float, float]:
        return _ORIGIN[0] + x * _SIDE, self._foot - y / self._top * _HEIGHT

    def bar(self, left: float, right: float, low: float, high: float, **paint: Any) -> None:
        """A rectangle, whichever of low and high is larger, if they differ; one pixel apart from its neighbour."""
        (x0, y0), (x1, y1) = self.at(left, max(low, high)), self.at(right, min(low, high))
        if y1 > y0:
            self.draw.rectangle((x0 + 1, y0, max(x0 + 1, x1 - 1), y1), **paint)

    def line(self, points: Iterable[tuple[float, float]], fill: tuple[int, int, int] = _BLUE, width: int = 2) -> None:
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
        _write(self.draw, at, text, size=size, anchor=anchor)

    def image(self) -> Image:
        return Image(np.asarray(self._canvas, dtype=np.uint8))


def reliability_diagram(curve: Curve) -> Image:
    """Accuracy of each bin of confidence against its mean confidence, and below how many predictions each bin has.

    curve: lower, upper, confidence, accuracy, count of the non-empty bins. Above the blue is the gap between the two:
    red where confidence is the higher end, green where accuracy is.
    """
    strip = 34
    plot = _Plot("reliability", "confidence", "accuracy (red: too confident, green: too modest)", below=strip + 12)
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
    plot.write((_ORIGIN[0] - 4, foot), "n", anchor="rs")
    return plot.image()


def precision_recall_curve(curve: Curve) -> Image:
    """Precision over recall; dashed the share of positives, which is what chance gives."""
    return _curve("precision and recall", "recall", curve["recall"], "precision", curve["precision"])


def risk_coverage_curve(curve: Curve) -> Image:
    """Accuracy of the predictions that are kept over their share; dashed the accuracy of all."""
    title = "accuracy when the uncertain are refused"
    return _curve(title, "share kept, most certain first", curve["coverage"], "accuracy", curve["accuracy"])


def _curve(title: str, x: str, xs: NDArray[np.float64], y: str, ys: NDArray[np.float64]) -> Image:
    plot = _Plot(title, x, y)
    plot.dashes((0, float(ys[-1])), (1, float(ys[-1])))
    plot.line(zip(xs.tolist(), ys.tolist(), strict=True))
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
