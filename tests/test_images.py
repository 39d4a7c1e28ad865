"""Pictures of matrices are labelled, in scale, and fit TensorBoard's page."""

from __future__ import annotations

import numpy as np
import pytest

from torchprobe import pictures as images

YELLOW, PURPLE = (253, 231, 37), (68, 1, 84)


def ink(pixels: np.ndarray) -> int:
    return int((pixels < 100).all(-1).sum() - (pixels == np.array(PURPLE, np.uint8)).all(-1).sum())


def area(pixels: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((pixels == np.array(colour, np.uint8)).all(-1).sum())


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 12, 33])
@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (1, 128), (128, 1), (128, 128), (65, 128)])
def test_a_grid_is_at_most_two_tiles_wide_and_shows_every_tile(heads, shape):
    tiles = [np.zeros(shape) for _ in range(heads)]
    tiles[-1][-1, -1] = 1.0
    pixels = images.grid(tiles, [f"head {i}" for i in range(heads)], title="blocks.0", axes="queries down").pixels
    assert pixels.shape[1] <= 2 * images.TILE
    assert ink(pixels) > 100
    assert area(pixels, YELLOW) > images._BAR  # the cell, besides the upper end of the colour bar


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (12, 12), (80, 64), (1, 96)])
def test_a_heat_map_is_one_tile_wide_and_numbered(shape):
    matrix = np.arange(np.prod(shape), dtype=float).reshape(shape)
    bare = images.heat_map(np.zeros((1, 1)), rows="", columns="").pixels
    pixels = images.heat_map(matrix, rows="layer", columns="head", title="entropy").pixels
    assert pixels.shape[1] == images.TILE
    assert ink(pixels) > ink(bare)


def test_a_cell_without_a_value_is_grey():
    pixels = images.heat_map(np.array([[np.nan, 1.0]]), rows="layer", columns="head").pixels
    assert area(pixels, images._NOTHING) > 1000


def test_values_beyond_the_scale_have_its_last_colour():
    pixels = images.grid([np.full((4, 4), 0.5)], ["head 0"], high=0.1).pixels
    assert area(pixels, YELLOW) >= 256 * 256


@pytest.mark.parametrize(
    ("count", "length", "step"), [(4, 256, 1), (128, 256, 20), (128, 128, 50), (12, 220, 2), (1, 1, 50)]
)
def test_numbers_do_not_touch(count, length, step):
    assert images._spacing(count, length, 26) == step
