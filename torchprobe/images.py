"""Pictures of matrices for TensorBoard's Images page, drawn with Pillow in the drain thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from torchprobe.records import Image

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

TILE = 320  # pixels: TensorBoard shows no picture wider without scaling it down
_MARGIN = 34  # room for labels at the left and above
_BAR = 10  # width of the colour bar
_GAP = 6
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
    from PIL import Image as Pillow
    from PIL import ImageDraw

    low, high = _limits(matrix, low, high)
    room = TILE - _MARGIN - _BAR - 2 * _GAP - 36
    pixels = enlarged(coloured(matrix, low, high), room)
    height = pixels.shape[0] + _MARGIN + 18
    canvas = Pillow.new("RGB", (TILE, max(height, 110)), "white")
    canvas.paste(Pillow.fromarray(pixels), (_MARGIN, _MARGIN))
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, 2), title, fill="black")
    draw.text((_MARGIN, 18), f"{columns} 0 to {matrix.shape[1] - 1}", fill="black")
    _row_labels(draw, matrix.shape[0], pixels.shape[0], rows)
    _colour_bar(canvas, draw, (_MARGIN + room + 2 * _GAP, max(pixels.shape[0], 70)), low, high)
    return Image(np.asarray(canvas, dtype=np.uint8))


def grid(tiles: Sequence[NDArray[np.float64]], titles: Sequence[str], *, title: str = "", columns: int = 4) -> Image:
    """Several matrices of one kind side by side, each with its title, on one colour scale from 0 to their maximum.

    Each picture is at most `TILE // columns` pixels wide, so that the whole is no wider than `TILE` by much.
    """
    from PIL import Image as Pillow
    from PIL import ImageDraw

    columns = max(1, min(columns, len(tiles)))
    side = TILE // 2 if columns > 1 else TILE - _BAR
    high = max((float(np.nanmax(tile)) for tile in tiles if np.isfinite(tile).any()), default=1.0)
    cells = [enlarged(coloured(tile, 0.0, high), side) for tile in tiles]
    tall = max(cell.shape[0] for cell in cells) + 16
    lines = -(-len(tiles) // columns)
    canvas = Pillow.new("RGB", (columns * (side + _GAP) + 60, 18 + lines * tall + _GAP), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((2, 2), title, fill="black")
    for i, (cell, name) in enumerate(zip(cells, titles, strict=True)):
        left, top = (i % columns) * (side + _GAP), 18 + (i // columns) * tall
        draw.text((left + 2, top), name, fill="black")
        canvas.paste(Pillow.fromarray(cell), (left, top + 14))
    _colour_bar(canvas, draw, (columns * (side + _GAP), min(tall, 120) - 16), 0.0, high)
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


def _row_labels(draw: ImageDraw, count: int, height: int, name: str) -> None:
    draw.text((2, 2), name, fill="black")
    step = max(1, -(-count * 12 // max(height, 1)))
    for row in range(0, count, step):
        draw.text((_MARGIN - 22, _MARGIN + (row + 0.5) * height / count - 6), f"{row:>3}", fill="black")


def _colour_bar(canvas: object, draw: ImageDraw, at: tuple[int, int], low: float, high: float) -> None:
    from PIL import Image as Pillow

    left, height = at
    ramp = coloured(np.linspace(1.0, 0.0, height)[:, None].repeat(_BAR, axis=1), 0.0, 1.0)
    canvas.paste(Pillow.fromarray(ramp), (left, _MARGIN))  # type: ignore[attr-defined]
    draw.text((left + _BAR + 3, _MARGIN - 4), f"{high:.3g}", fill="black")
    draw.text((left + _BAR + 3, _MARGIN + height - 10), f"{low:.3g}", fill="black")
