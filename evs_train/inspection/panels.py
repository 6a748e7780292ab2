"""Pictures of an observation: for each temporal unit its heat map and, for each rate, its kept patches, side by side.

Invariant: the heat map's colours are `heat_colors` of the scores as they are, on one scale for the whole video; kept
and dropped patches are drawn by `visualize.kept_tile`. Nothing is cut off: texts that are too long end in "...".
Cost: a few milliseconds a unit.
Not here: files; `writers.py` writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from evs_train.inspection.observe import Observation
from evs_train.visualize import MARGIN, figure_title, kept_tile, per_pixel

CAPTION = 20  # pixels: height of a line under a panel, and of a panel's title
GUTTER = 24  # pixels: between the columns of a sheet
LEGEND_WIDTH = 160
CHART_HEIGHT = 48
MIN_CELL = 124  # pixels: width that "unit 123, 1000.50 s" needs
HEAT = np.array([(254, 235, 214), (253, 187, 132), (227, 74, 51), (127, 0, 0)], dtype=np.float64)
"""Colours from the lowest score to the highest; each is darker than the one before."""
FIRST_UNIT = (200, 200, 205)
"""Colour of unit 0, which has no unit before it to differ from."""
MIN_HEADER = 640  # pixels: width that the header's lines need
_INK, _FAINT, _PAPER = (20, 20, 20), (225, 225, 228), (255, 255, 255)
_BAR, _CURRENT = (70, 110, 170), (217, 95, 2)


def heat_colors(scores: NDArray[np.float32], peak: float) -> NDArray[np.uint8]:
    """Colours (..., 3) of scores on a scale from 0 to `peak`, straight between the colours of `HEAT`.

    Scores outside are given the end's colour: bfloat16 leaves a cosine a little above 1.
    """
    place = np.clip(scores.astype(np.float64) / (peak or 1.0), 0.0, 1.0) * (len(HEAT) - 1)
    channels = [np.interp(place, np.arange(len(HEAT)), HEAT[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


@dataclass(frozen=True)
class Panels:
    """Draws an observation. Panels' longer sides lie between `smallest` (enlarged) and `largest` pixels (reduced)."""

    seen: Observation
    smallest: int
    largest: int

    @cached_property
    def peak(self) -> float:
        """The highest score behind unit 0: the dark end of the scale."""
        return float(self.seen.scores[1:].max()) if self.seen.num_units > 1 else 0.0

    @cached_property
    def panel_size(self) -> tuple[int, int]:
        """(width, height) of one panel."""
        return kept_tile(self.seen.clip.frames[0], self.seen.kept[0, 0], self.smallest, self.largest).size

    @property
    def cell_width(self) -> int:
        return max(self.panel_size[0], MIN_CELL) + MARGIN

    @property
    def row_size(self) -> tuple[int, int]:
        """(width, height) of `row`; the left margin is the caller's."""
        return self.cell_width * (1 + len(self.seen.rates)), self.panel_size[1] + CAPTION + MARGIN

    def heat_tile(self, unit: int) -> Image.Image:
        """The scores of one unit as a picture of a panel's size, without smoothing."""
        width, height = self.panel_size
        if unit == 0:
            return Image.new("RGB", (width, height), FIRST_UNIT)
        return Image.fromarray(heat_colors(per_pixel(self.seen.scores[unit : unit + 1], height, width)[0], self.peak))

    def titles(self) -> Image.Image:
        """One line: what the panels of the rows under it show."""
        picture = Image.new("RGB", (self.row_size[0], CAPTION), _PAPER)
        for place, title in enumerate(["change"] + [f"rate {rate:g}" for rate in self.seen.rates]):
            write(picture, (place * self.cell_width, 1), title, 14, self.cell_width - MARGIN)
        return picture

    def row(self, frame: int) -> Image.Image:
        """Heat map and kept patches of one frame, each with its line: unit and time, then tokens kept of the unit."""
        seen, unit = self.seen, frame // self.seen.frames_per_unit
        pixels = seen.clip.frames[frame]
        tiles = [self.heat_tile(unit)]
        tiles += [kept_tile(pixels, of_rate[unit], self.smallest, self.largest) for of_rate in seen.kept]
        captions = [f"unit {unit}, {seen.clip.timestamps[frame]:.2f} s"]
        captions += [f"kept {count}/{seen.tokens_per_unit}" for count in seen.counts[:, unit]]
        picture = Image.new("RGB", self.row_size, _PAPER)
        for place, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
            picture.paste(tile, (place * self.cell_width, 0))
            write(picture, (place * self.cell_width, tile.height + 2), caption, 13, self.cell_width - MARGIN)
        return picture

    def header(self, width: int, current: int | None = None) -> Image.Image:
        """What was looked at, the scale of the heat map, and a chart of kept tokens per unit for each rate.

        Args:
            width: of the picture, in pixels.
            current: unit to mark in the charts.
        """
        seen, charts = self.seen, min(len(self.seen.rates), max(1, width // 300))
        lines, top = -(-len(seen.rates) // charts), 46 + CAPTION
        picture = Image.new("RGB", (width, top + lines * (CHART_HEIGHT + CAPTION + MARGIN)), _PAPER)
        write(picture, (0, 2), seen.clip.path, 17, width, from_left=True)
        counts = f"sampled frames: {len(seen.clip.frames)}, units: {seen.num_units} of {seen.tokens_per_unit} tokens"
        write(picture, (0, 26), f"{counts}, scored {seen.scored_as}", 13, width)
        self._legend(picture, 46)
        for place, rate in enumerate(seen.rates):
            line, column = divmod(place, charts)
            left, right = column * width // charts, (column + 1) * width // charts - MARGIN
            above = top + line * (CHART_HEIGHT + CAPTION + MARGIN)
            write(picture, (left, above), figure_title(seen.kept[place], rate), 14, right - left)
            self._chart(picture, seen.counts[place], (left, above + CAPTION, right), current)
        return picture

    def _legend(self, picture: Image.Image, top: int) -> None:
        ramp = heat_colors(np.linspace(0, 1, LEGEND_WIDTH, dtype=np.float32)[None].repeat(10, 0), 1.0)
        note = f"0 to {self.peak:.3g}: change (1 - cosine to the unit before); grey: the first unit"
        picture.paste(Image.fromarray(ramp), (0, top + 3))
        write(picture, (LEGEND_WIDTH + 6, top), note, 13, picture.width - LEGEND_WIDTH - 6)

    def _chart(
        self, picture: Image.Image, counts: NDArray[np.int64], box: tuple[int, int, int], current: int | None
    ) -> None:
        """A bar for each unit on a track as high as all of its tokens; `box` is left, top and right."""
        left, top, right = box
        draw, num_units = ImageDraw.Draw(picture), len(counts)
        gap = 1 if (right - left) // num_units >= 4 else 0
        draw.rectangle((left, top, right - 1, top + CHART_HEIGHT - 1), fill=_FAINT)
        for unit, count in enumerate(counts.tolist()):
            start, end = (left + (unit + step) * (right - left) // num_units for step in (0, 1))
            height = round(CHART_HEIGHT * count / self.seen.tokens_per_unit)
            if height:
                color = _CURRENT if unit == current else _BAR
                last = max(start, end - 1 - gap)
                draw.rectangle((start, top + CHART_HEIGHT - height, last, top + CHART_HEIGHT - 1), fill=color)
        if current is not None:  # also where nothing of the unit is kept
            start, end = (left + (current + step) * (right - left) // num_units for step in (0, 1))
            draw.rectangle((start, top + CHART_HEIGHT, max(start, end - 1), top + CHART_HEIGHT + 3), fill=_CURRENT)

    def scene(self, frame: int) -> Image.Image:
        """One frame with everything about it: header with its unit marked, titles and row."""
        head = self.header(max(MIN_HEADER, self.row_size[0]), current=frame // self.seen.frames_per_unit)
        return framed([head, self.titles(), self.row(frame)])

    def sheet(self) -> Image.Image:
        """All units, by their first frames, from top to bottom in as many columns as make the sheet wide."""
        (width, height), num_units = self.row_size, self.seen.num_units
        wide = (n for n in range(1, num_units) if -(-num_units // n) * height <= n * width)
        per_column = -(-num_units // next(wide, num_units))
        columns = -(-num_units // per_column)
        body = Image.new("RGB", (columns * (width + GUTTER) - GUTTER, CAPTION + per_column * height), _PAPER)
        for unit in range(num_units):
            column, line = divmod(unit, per_column)
            left = column * (width + GUTTER)
            if line == 0:
                body.paste(self.titles(), (left, 0))
            body.paste(self.row(unit * self.seen.frames_per_unit), (left, CAPTION + line * height))
        return framed([self.header(max(MIN_HEADER, body.width)), body])


def framed(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures under each other, the first the widest, with a margin; both sides are even, as H.264 wants them."""
    width, height = pictures[0].width + 2 * MARGIN, sum(one.height for one in pictures) + 2 * MARGIN
    whole = Image.new("RGB", (width + width % 2, height + height % 2), _PAPER)
    top = MARGIN
    for one in pictures:
        whole.paste(one, (MARGIN, top))
        top += one.height
    return whole


def write(
    picture: Image.Image, place: tuple[int, int], text: str, size: int, width: int, *, from_left: bool = False
) -> None:
    """Write a line that is at most `width` pixels long, shortened at its end or, `from_left`, at its beginning."""
    font = ImageFont.load_default(size=size)
    short = text
    while font.getlength(short) > width and len(short) > 4:
        text = text[1:] if from_left else text[:-1]
        short = f"...{text}" if from_left else f"{text}..."
    ImageDraw.Draw(picture).text(place, short, fill=_INK, font=font)
