"""Pictures, pages and films say what was observed: pixels and numbers are read back from the files."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageFont

from evs_train.errors import RecipeError
from evs_train.inspection import panels as drawing
from evs_train.inspection.observe import Observation
from evs_train.inspection.panels import CAPTION, FIRST_UNIT, GUTTER, HEAT, MIN_HEADER, Panels, framed, heat_colors
from evs_train.inspection.panels import write as write_line
from evs_train.inspection.writers import summary, write
from evs_train.visualize import MARGIN
from tests.conftest import write_noise
from tests.inspection.conftest import RATES, Look

FAMILIES = ("qwen3_vl", "internvl", "nemotron_h_omni", "llava_onevision")
"""Units of two frames and of one, with grids that follow the frame and with square ones."""


def scene_panels(seen: Observation) -> Panels:
    """As the page and the film draw them."""
    largest = min(480, 1920 // (1 + len(seen.rates)))
    return Panels(seen, min(240, largest), largest)


def panel(picture: np.ndarray, panels: Panels, top: int, place: int, left: int = MARGIN) -> np.ndarray:
    """Pixels of the panel number `place` of a row whose upper left corner is given."""
    width, height = panels.panel_size
    return picture[top : top + height, left + place * panels.cell_width :][:, :width]


def inner(pixels: np.ndarray, grid: tuple[int, int], y: int, x: int) -> np.ndarray:
    """A cell without the pixels at its borders."""
    height, width = pixels.shape[:2]
    rows, columns = (
        [-(-length * (i + step) // n) for step in (0, 1)]
        for length, n, i in ((height, grid[0], y), (width, grid[1], x))
    )
    return pixels[rows[0] + 2 : rows[1] - 2, columns[0] + 2 : columns[1] - 2]


def check_panels(
    seen: Observation, panels: Panels, unit: int, frame: int, picture: np.ndarray, top: int, left: int, loose: bool
) -> None:
    """The heat map has the colours of the scores; kept cells are the frame, dropped ones grey and dark."""
    grid = seen.scores.shape[1:]
    width, height = panels.panel_size
    plain = np.asarray(Image.fromarray(seen.clip.frames[frame]).resize((width, height), Image.Resampling.NEAREST))
    peak = seen.scores[1:].max()
    for y in range(grid[0]):
        for x in range(grid[1]):
            heat = inner(panel(picture, panels, top, 0, left), grid, y, x).astype(int)
            wanted = np.array(FIRST_UNIT) if unit == 0 else heat_colors(seen.scores[unit, y, x], peak).astype(int)
            assert np.abs(heat - wanted).max() <= (24 if loose else 0), (unit, y, x)
            frame_cell = inner(plain, grid, y, x).astype(float)
            for place, of_rate in enumerate(seen.kept, start=1):
                cell = inner(panel(picture, panels, top, place, left), grid, y, x).astype(float)
                kept = of_rate[unit, y, x]
                if not loose:
                    assert (cell == frame_cell).all() == kept, (place, unit, y, x)
                wanted_mean = frame_cell.mean() if kept else 0.25 * (frame_cell @ [0.299, 0.587, 0.114]).mean()
                assert abs(cell.mean() - wanted_mean) < (8 if loose else 1), (place, unit, y, x)


@pytest.mark.parametrize("family", FAMILIES)
def test_png_shows_the_choice_and_the_scores(family: str, look: Look, tmp_path: Path) -> None:
    seen = look(family)
    write(seen, tmp_path / "kept.png")
    with Image.open(tmp_path / "kept.png") as read:
        assert read.format == "PNG"
        picture = np.asarray(read)
    panels = Panels(seen, 160, 320)
    width, height = panels.row_size
    columns = (picture.shape[1] - 2 * MARGIN + GUTTER) // (width + GUTTER)
    per_column = -(-seen.num_units // columns)
    top = MARGIN + panels.header(picture.shape[1] - 2 * MARGIN).height + CAPTION
    for unit in range(seen.num_units):
        column, line = divmod(unit, per_column)
        left = MARGIN + column * (width + GUTTER)
        check_panels(seen, panels, unit, unit * seen.frames_per_unit, picture, top + line * height, left, loose=False)


def test_film_shows_every_sampled_frame(look: Look, tmp_path: Path) -> None:
    seen = look("qwen3_vl")
    write(seen, tmp_path / "kept.mp4")
    with av.open(str(tmp_path / "kept.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert container.streams.video[0].average_rate == 8
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == len(seen.clip.frames) == 13
    panels = scene_panels(seen)
    assert frames[0].shape == np.asarray(panels.scene(0)).shape
    top = MARGIN + panels.header(panels.row_size[0]).height + CAPTION
    for number in (0, 1, 7, 12):
        check_panels(seen, panels, number // 2, number, frames[number], top, MARGIN, loose=True)


class Page(HTMLParser):
    """What a page refers to, its table, and whether its tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.cells: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in ("img", "br", "input", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_page_is_self_contained_and_says_the_counts(look: Look, tmp_path: Path) -> None:
    seen = look("qwen3_vl")
    write(seen, tmp_path / "kept.html")
    text = (tmp_path / "kept.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    prefix = "data:image/jpeg;base64,"
    assert len(page.links) == seen.num_units
    assert all(link.startswith(prefix) for link in page.links)
    assert "://" not in text
    assert "import" not in text
    assert "url(" not in text
    table = np.array(page.cells).reshape(seen.num_units, 2 + len(RATES))
    assert table[:, 0].tolist() == [str(unit) for unit in range(7)]
    assert table[:, 1].tolist() == [f"{0.25 * unit:.2f}" for unit in range(7)]
    assert (seen.counts == table[:, 2:].astype(int).T).all()
    assert 'max="6"' in text
    panels = scene_panels(seen)
    top = MARGIN + panels.header(panels.row_size[0]).height + CAPTION
    for unit in (0, 3, 6):
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(page.links[unit].removeprefix(prefix)))))
        check_panels(seen, panels, unit, 2 * unit, picture, top, MARGIN, loose=True)


def test_a_name_is_no_markup(look: Look, tmp_path: Path) -> None:
    write_noise(tmp_path / "<b>&.mp4", num_frames=4)
    write(look(video=tmp_path / "<b>&.mp4"), tmp_path / "page.html")
    assert "<b>" not in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("num_rates", [1, 2, 3])
def test_rates_stand_side_by_side(num_rates: int, look: Look) -> None:
    seen = look(rates=RATES[:num_rates])
    panels = Panels(seen, 160, 320)
    assert panels.panel_size == (192, 128)
    assert panels.row(0).width == (192 + MARGIN) * (1 + num_rates)
    assert panels.scene(0).width == max(MIN_HEADER, panels.row(0).width) + 2 * MARGIN
    sheet = panels.sheet()
    assert (sheet.width - 2 * MARGIN + GUTTER) % (panels.row(0).width + GUTTER) == 0


def test_charts_are_as_high_as_the_counts(look: Look) -> None:
    seen = look(rates=(0.75,))
    picture = np.asarray(Panels(seen, 160, 320).header(700, current=2))
    bar, current = np.array(drawing._BAR), np.array(drawing._CURRENT)
    for unit, count in enumerate(seen.counts[0]):
        column = picture[:, unit * 692 // 7 + 20]
        colored = (column == (current if unit == 2 else bar)).all(-1).sum()
        extra = 4 if unit == 2 else 0  # the mark under the chart
        assert colored == round(drawing.CHART_HEIGHT * count / seen.tokens_per_unit) + extra


def test_both_sides_are_even_as_h264_wants_them() -> None:
    assert framed([Image.new("RGB", (101, 50)), Image.new("RGB", (7, 51))]).size == (102 + 2 * MARGIN, 102 + 2 * MARGIN)


def test_heat_colors_are_one_scale() -> None:
    scores = np.array([-0.1, 0.0, 0.5, 1.0, 1.5], dtype=np.float32)
    colors = heat_colors(scores, 1.5)
    assert colors[0].tolist() == colors[1].tolist() == HEAT[0].tolist()
    assert colors[2].tolist() == HEAT[1].tolist()
    assert colors[4].tolist() == HEAT[-1].tolist()
    darkness = heat_colors(np.linspace(0, 1, 50, dtype=np.float32), 1.0) @ [0.299, 0.587, 0.114]
    assert (np.diff(darkness) < 0).all()
    assert heat_colors(np.zeros(1, dtype=np.float32), 0.0).tolist() == [HEAT[0].tolist()]


def test_the_header_s_own_lines_are_never_shortened(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its smallest width, with long numbers; the title line may be, since paths have any length."""
    seen = replace(look(), scored_as="with evs.score=embeds in bfloat16")
    drawn: list[tuple[str, int, int]] = []
    monkeypatch.setattr(drawing, "write", lambda p, at, text, size, width, **_: drawn.append((text, size, width)))
    Panels(seen, 160, 320).header(MIN_HEADER)
    assert len(drawn) == 3 + len(RATES)
    for text, size, width in drawn[1:]:
        assert ImageFont.load_default(size=size).getlength(text) <= width, text


def test_long_lines_are_shortened() -> None:
    for from_left in (False, True):
        picture = Image.new("RGB", (300, 20), (255, 255, 255))
        write_line(picture, (0, 0), "a very long name " * 9, 14, 200, from_left=from_left)
        dark = np.asarray(picture).min(axis=(0, 2)) < 200
        assert dark[150:200].any()
        assert not dark[202:].any()


@pytest.mark.parametrize("num_frames", [1, 40])
@pytest.mark.parametrize("suffix", [".png", ".html", ".mp4"])
def test_any_length_and_shape(num_frames: int, suffix: str, look: Look, tmp_path: Path) -> None:
    """A still, and a high clip of more units than one column holds, with names that are longer than its width."""
    clip = tmp_path / f"{'long name ' * 8}.mp4"
    write_noise(clip, num_frames=num_frames, width=32)
    seen = look(video=clip, rates=(0.5,))
    out = tmp_path / f"o{suffix}"
    write(seen, out)
    assert out.stat().st_size > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([clip.name, out.name])
    if suffix == ".png":
        with Image.open(out) as read:
            assert 0.4 < read.width / read.height < 4


def test_the_summary_counts(look: Look) -> None:
    seen = look(rates=(0.75,))
    lines = summary(seen)
    assert lines[1].startswith(f"rate 0.75: kept {seen.kept.sum()}/{seen.kept.size} tokens")
    assert [int(count) for count in re.findall(r"\d+", lines[2])] == seen.counts[0].tolist()


def test_what_cannot_be_written_is_told(look: Look, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be written"):
        write(look(), tmp_path / "gone" / "o.png")
