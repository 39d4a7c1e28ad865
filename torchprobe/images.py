"""Pictures of matrices for TensorBoard's Images page, drawn with Pillow in the drain thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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


def heat_map(
    matrix: NDArray[np.float64],
    *,
    rows: str,
    columns: str,
    title: str = "",
    low: float | None = None,
    high: float | None = None,
) -> Image:
    """A labelled picture of a matrix with a colour bar, at most `TILE` pixels wide.

    matrix: shape (rows, columns); NaN cells are grey. rows, columns: what the axes are. low, high: the values at
    the ends of the colour bar, by default the smallest and the largest there are.
    """
    low, high = _limits(matrix, low, high)
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
    share = np.clip((matrix - low) / (high - low if high > low else 1.0), 0.0, 1.0) * (len(_STOPS) - 1)
    known = np.isfinite(share)
    share = np.where(known, share, 0.0)
    below = np.minimum(share.astype(np.int64), len(_STOPS) - 2)
    part = (share - below)[..., None]
    colours = _STOPS[below] * (1 - part) + _STOPS[below + 1] * part
    pixels: NDArray[np.uint8] = np.where(known[..., None], colours, _NOTHING).round().astype(np.uint8)
    return pixels


def enlarged(pixels: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Whole-number enlargement to at most `width`, so that cells stay sharp; larger ones are pooled by striding."""
    rows, columns = pixels.shape[:2]
    if max(rows, columns) > width:
        step = -(-max(rows, columns) // width)
        return pixels[::step, ::step]
    factor = max(1, width // max(rows, columns))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def _limits(matrix: NDArray[np.float64], low: float | None, high: float | None) -> tuple[float, float]:
    finite = matrix[np.isfinite(matrix)]
    least, most = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    return least if low is None else low, most if high is None else high


def _blank(width: int, height: int, title: str) -> tuple[Picture, ImageDraw]:
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
    from PIL import ImageFont

    draw.text(at, text, fill="black", font=ImageFont.load_default(size), anchor=anchor)


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
