"""Pictures of which patches of a video EVS keeps, for the run's log, the model card and `evs-train inspect`.

Invariant: the pixels of a kept patch are the pixels of the frame; a dropped patch is its grey value at a quarter of the
brightness. Patch borders are proportional to the frame, so a grid need not divide the frame size.

Cost: a few milliseconds for a clip (NumPy and Pillow; matplotlib would take near a second, too long between training
steps). Memory is one copy of the frames, or of one tile per temporal unit in `kept_figure`.

What it does NOT do: choose the tokens, or decode video; it draws a given retention mask on given frames.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Value = TypeVar("Value", bound=np.generic)

DIM = 0.25  # brightness of a dropped patch
TILES_PER_ROW = 8
MARGIN = 8  # pixels round each tile
TITLE_HEIGHT = 26
CAPTION_HEIGHT = 20
_MIN_TILE, _MAX_TILE = 160, 320  # pixels: smaller frames are enlarged by a whole factor, larger ones reduced
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_BACKGROUND, _INK = (255, 255, 255), (20, 20, 20)
_DROPPED_EDGE = (110, 60, 60)  # outlines dropped patches, or a dark clip would hide them
_MIN_OUTLINED_CELL = 8  # pixels; on a finer grid the outlines would cover the picture


def kept_overlay(frames: NDArray[np.uint8], kept: NDArray[np.bool_], frames_per_unit: int) -> NDArray[np.uint8]:
    """Return the frames with every dropped patch dimmed to dark grey; kept patches are unchanged.

    Args:
        frames: (F, H, W, 3) uint8, RGB.
        kept: (T, h, w) bool, True where the token of that temporal unit and place is kept.
        frames_per_unit: frames in one temporal unit; T must be ceil(F / frames_per_unit).

    Returns:
        A new array (F, H, W, 3) uint8.

    Raises:
        ValueError: the shapes do not belong together.
    """
    _check_shapes(frames, kept, frames_per_unit)
    pixel_kept = per_pixel(kept, frames.shape[1], frames.shape[2])  # (T, h, w) -> (T, H, W)
    overlay = frames.copy()
    for index, frame in enumerate(frames):
        dropped = ~pixel_kept[index // frames_per_unit]
        grey = frame[dropped] @ _LUMA * DIM  # (pixels, 3) -> (pixels,)
        overlay[index][dropped] = grey.round().astype(np.uint8)[:, None]
    return overlay


def kept_figure(
    frames: NDArray[np.uint8], kept: NDArray[np.bool_], frames_per_unit: int, *, pruning_rate: float
) -> Image.Image:
    """Return one picture per temporal unit, its first frame with dropped patches dimmed, in rows of at most 8.

    Under each picture stands how many tokens of that unit are kept, above all the rate and the totals.

    Args:
        frames: (F, H, W, 3) uint8, RGB.
        kept: (T, h, w) bool; see `kept_overlay`.
        frames_per_unit: frames in one temporal unit.
        pruning_rate: the rate that was asked for, for the title.

    Raises:
        ValueError: the shapes do not belong together.
    """
    _check_shapes(frames, kept, frames_per_unit)
    tiles = [kept_tile(frame, mask) for frame, mask in zip(frames[::frames_per_unit], kept, strict=True)]
    font = ImageFont.load_default(size=14)
    title = figure_title(kept, pruning_rate)
    columns, rows = min(len(tiles), TILES_PER_ROW), -(-len(tiles) // TILES_PER_ROW)
    cell_width, cell_height = tiles[0].width + MARGIN, tiles[0].height + CAPTION_HEIGHT + MARGIN
    width = max(columns * cell_width, int(font.getlength(title)) + MARGIN) + MARGIN
    figure = Image.new("RGB", (width, TITLE_HEIGHT + rows * cell_height), _BACKGROUND)
    draw = ImageDraw.Draw(figure)
    draw.text((MARGIN, MARGIN // 2), title, fill=_INK, font=font)
    for index, (tile, caption) in enumerate(zip(tiles, unit_captions(kept), strict=True)):
        row, column = divmod(index, TILES_PER_ROW)
        left, top = MARGIN + column * cell_width, TITLE_HEIGHT + row * cell_height
        figure.paste(tile, (left, top))
        draw.text((left, top + tile.height + 2), caption, fill=_INK, font=font)
    return figure


def figure_title(kept: NDArray[np.bool_], pruning_rate: float) -> str:
    """Return the title of `kept_figure`: rate asked for, tokens kept of all, and the share that this is."""
    retained_tokens = int(kept.sum())
    return f"rate {pruning_rate:.3g}: kept {retained_tokens}/{kept.size} tokens ({retained_tokens / kept.size:.1%})"


def unit_captions(kept: NDArray[np.bool_]) -> list[str]:
    """Return one caption per temporal unit: its number and how many of its tokens are kept."""
    return [f"{unit}: {int(mask.sum())}/{mask.size}" for unit, mask in enumerate(kept)]


def save_png(image: Image.Image, path: str | Path) -> Path:
    """Write `image` as PNG to `path`, making its folder if it is missing, and return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG")
    return path


def kept_tile(
    frame: NDArray[np.uint8], mask: NDArray[np.bool_], smallest: int = _MIN_TILE, largest: int = _MAX_TILE
) -> Image.Image:
    """Return `frame` (H, W, 3) at a legible size, dropped patches of `mask` (h, w) dimmed and outlined.

    Where its longer side is below `smallest` pixels it is enlarged by a whole factor, above `largest` reduced to that.
    """
    height, width, _ = frame.shape
    picture = Image.fromarray(frame)
    if max(height, width) < smallest:
        factor = -(-smallest // max(height, width))
        picture = picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)
    elif max(height, width) > largest:
        shrink = largest / max(height, width)
        size = max(1, round(width * shrink)), max(1, round(height * shrink))
        picture = picture.resize(size, Image.Resampling.BOX)
    pixels = kept_overlay(np.asarray(picture)[None], mask[None], frames_per_unit=1)[0]
    if min(pixels.shape[0] // mask.shape[0], pixels.shape[1] // mask.shape[1]) >= _MIN_OUTLINED_CELL:
        dropped = ~per_pixel(mask[None], pixels.shape[0], pixels.shape[1])[0]
        pixels[dropped & _cell_edges(pixels.shape[0], pixels.shape[1], mask.shape)] = _DROPPED_EDGE
    return Image.fromarray(pixels)


def per_pixel(grids: NDArray[Value], height: int, width: int) -> NDArray[Value]:
    """Spread one value per cell over pixels by proportional cell borders: (T, h, w) -> (T, height, width)."""
    _, grid_height, grid_width = grids.shape
    cell_rows = np.arange(height) * grid_height // height
    cell_columns = np.arange(width) * grid_width // width
    return grids[:, cell_rows[:, None], cell_columns]


def _cell_edges(height: int, width: int, grid: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return True on the first row and column of pixels of every cell: (height, width)."""
    cell_rows, cell_columns = np.arange(height) * grid[0] // height, np.arange(width) * grid[1] // width
    first_row, first_column = np.diff(cell_rows, prepend=-1) > 0, np.diff(cell_columns, prepend=-1) > 0
    edges: NDArray[np.bool_] = first_row[:, None] | first_column[None]
    return edges


def _check_shapes(frames: NDArray[np.uint8], kept: NDArray[np.bool_], frames_per_unit: int) -> None:
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(f"frames must be (F, H, W, 3) uint8 and not empty, got {frames.shape} {frames.dtype}")
    if kept.ndim != 3 or kept.dtype != np.bool_ or not kept.size:
        raise ValueError(f"kept must be (T, h, w) bool and not empty, got {kept.shape} {kept.dtype}")
    num_units = -(-len(frames) // frames_per_unit)
    if num_units != len(kept):
        raise ValueError(f"{len(frames)} frames, {frames_per_unit} a unit, are {num_units} units; kept has {len(kept)}")
