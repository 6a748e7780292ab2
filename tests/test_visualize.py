"""Pictures of kept patches, pixel by pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evs_train.visualize import (
    CAPTION_HEIGHT,
    DIM,
    MARGIN,
    TILES_PER_ROW,
    TITLE_HEIGHT,
    figure_title,
    kept_figure,
    kept_overlay,
    save_png,
    unit_captions,
)

RNG = np.random.default_rng(0)


def clip(num_frames: int, height: int = 96, width: int = 96) -> np.ndarray:
    return RNG.integers(60, 256, (num_frames, height, width, 3), dtype=np.uint8)


def half_kept(num_units: int, height: int = 6, width: int = 6) -> np.ndarray:
    kept = np.zeros((num_units, height, width), dtype=bool)
    kept[0] = True
    kept[1:, :, : width // 2] = True
    return kept


@pytest.mark.parametrize(("height", "width"), [(96, 96), (97, 50), (5, 7)])
def test_overlay_keeps_kept_pixels_and_dims_the_others(height: int, width: int) -> None:
    frames = clip(6, height, width)
    before = frames.copy()
    kept = RNG.random((3, 6, 6)) < 0.5
    overlay = kept_overlay(frames, kept, frames_per_unit=2)
    assert overlay.shape == frames.shape
    assert overlay.dtype == np.uint8
    assert (frames == before).all()
    for index in range(6):
        for y in range(height):
            for x in range(0, width, 3):
                pixel, original = overlay[index, y, x], frames[index, y, x].astype(float)
                if kept[index // 2, y * 6 // height, x * 6 // width]:
                    assert (pixel == original).all()
                else:
                    grey = DIM * (0.299 * original[0] + 0.587 * original[1] + 0.114 * original[2])
                    assert (pixel == pixel[0]).all()
                    assert abs(pixel[0] - grey) <= 0.51


def test_overlay_with_a_short_last_unit() -> None:
    frames = clip(5)
    overlay = kept_overlay(frames, half_kept(3), frames_per_unit=2)
    assert (overlay[:2] == frames[:2]).all()
    assert (overlay[4, :, :48] == frames[4, :, :48]).all()
    assert (overlay[4, :, 48:] < frames[4, :, 48:]).all()


def test_whole_clip_kept_is_unchanged() -> None:
    frames = clip(4)
    assert (kept_overlay(frames, np.ones((2, 3, 5), dtype=bool), 2) == frames).all()


def tile_pixels(figure: Image.Image, index: int, size: int) -> np.ndarray:
    row, column = divmod(index, TILES_PER_ROW)
    left = MARGIN + column * (size + MARGIN)
    top = TITLE_HEIGHT + row * (size + CAPTION_HEIGHT + MARGIN)
    return np.asarray(figure)[top : top + size, left : left + size]


def test_figure_shows_the_first_frame_of_each_unit_enlarged_and_wraps() -> None:
    frames, kept = clip(20), half_kept(10)
    figure = kept_figure(frames, kept, 2, pruning_rate=0.45)
    assert figure.width == TILES_PER_ROW * (192 + MARGIN) + MARGIN
    assert figure.height == TITLE_HEIGHT + 2 * (192 + CAPTION_HEIGHT + MARGIN)
    for unit in (0, 1, 7, 8, 9):
        enlarged = frames[2 * unit].repeat(2, axis=0).repeat(2, axis=1)
        pixels = tile_pixels(figure, unit, 192)
        assert (pixels[:, :96] == enlarged[:, :96]).all(), unit
        assert (pixels[:, 96:] == enlarged[:, 96:]).all() == (unit == 0), unit
        if unit:
            assert pixels[:, 96:].max() <= 110
            assert pixels[:, 96:].mean() < enlarged[:, 96:].mean() / 2


def test_dropped_patches_are_outlined_on_a_black_clip_and_kept_ones_are_not() -> None:
    figure = kept_figure(np.zeros((2, 96, 96, 3), dtype=np.uint8), half_kept(2), 1, pruning_rate=0.25)
    pixels = tile_pixels(figure, 1, 192)
    assert pixels[:, :96].max() == 0
    outlined = pixels[:, 96:].any(axis=-1)
    assert outlined[0::32].all()
    assert outlined[:, 0::32].all()
    assert not outlined[1:32, 1:32].any()


def test_large_frames_are_reduced() -> None:
    figure = kept_figure(clip(1, 720, 1280), half_kept(1), 1, pruning_rate=0.0)
    assert figure.width <= 320 + 2 * MARGIN + 60
    assert figure.height == TITLE_HEIGHT + 180 + CAPTION_HEIGHT + MARGIN


def test_counts_in_title_and_captions() -> None:
    kept = half_kept(3)
    assert unit_captions(kept) == ["0: 36/36", "1: 18/36", "2: 18/36"]
    assert figure_title(kept, 0.3333) == "rate 0.333: kept 72/108 tokens (66.7%)"


def test_captions_and_title_are_drawn_and_fit() -> None:
    figure = np.asarray(kept_figure(clip(1, 96, 40), half_kept(1), 1, pruning_rate=0.25))  # narrower than its title
    below = TITLE_HEIGHT + 192
    assert figure[:TITLE_HEIGHT].min() < 128
    assert figure[below : below + CAPTION_HEIGHT].min() < 128
    assert figure[:TITLE_HEIGHT, -MARGIN:].min() == 255  # the title ends before the right margin


def test_save_png_round_trip(tmp_path: Path) -> None:
    figure = kept_figure(clip(2), half_kept(2), 1, pruning_rate=0.25)
    path = save_png(figure, tmp_path / "new" / "kept.png")
    with Image.open(path) as read:
        assert read.format == "PNG"
        assert (np.asarray(read) == np.asarray(figure)).all()


@pytest.mark.parametrize(
    ("frames", "kept", "words"),
    [
        (clip(5), half_kept(2), "5 frames, 2 a unit, are 3 units; kept has 2"),
        (clip(2).astype(np.float32), half_kept(1), "uint8"),
        (clip(2), half_kept(1).astype(np.uint8), "bool"),
    ],
)
def test_wrong_shapes_are_refused(frames: np.ndarray, kept: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kept_overlay(frames, kept, 2)
