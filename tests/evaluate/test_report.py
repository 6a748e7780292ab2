"""The page and the figure show what the results say, and an export takes the rate they recommend."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from evs_train.checkpoint import EXPORT_RECORD, RECORD_FILE
from evs_train.cli import main
from evs_train.errors import RecipeError
from evs_train.evaluate.console import show_results
from evs_train.evaluate.figure import draw
from evs_train.evaluate.options import EvalOptions
from evs_train.evaluate.records import Record, run_identity
from evs_train.evaluate.report import recommended_rate, write_report
from evs_train.evaluate.summary import summarise
from tests.runs import arguments, recipe_of

RIGHT = {0.0: 90, 0.5: 90, 0.8: 60}  # of a hundred questions
NAME = "<b>runs & co</b>/export"


def results(**keys: Any) -> dict[str, Any]:
    """Of a hundred questions about as many videos; from rate .8 on only the first unit is left."""
    options = EvalOptions(model=["m"], data=["<i>rows</i>.jsonl"], **keys)
    records = [
        Record(
            0, f"q{i}", f"v{i}", ("count" if i % 2 else "<u>motion</u>",), rate, i < right, "A", (0.0, -1.0),
            video_tokens=100, retained=int(100 * (1 - rate)), tokens=150, first_unit_only=rate >= 0.8,
            prefill_seconds=1.0 - rate, dense_seconds=1.0, encode_seconds=1.0, peak_bytes=3 << 30,
        )
        for rate, right in RIGHT.items()
        for i in range(100)
    ]  # fmt: skip
    found = summarise(records, 100, [NAME], options)
    return {
        "written": "2026-01-01T00:00:00Z",
        "data": {"paths": options.data, "layout": "rows", "num_questions": 100, "num_videos": 100},
        "options": options.model_dump(),
        "environment": {"device": "cpu"},
        **found,
        "skipped": {"q101": "gone.mp4 is not there"},
    }


class Page(HTMLParser):
    """What a page refers to, and the cells of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells and self.tags[-1] in ("td", "th"):
            self.cells[-1] += data


def test_the_page_needs_no_other_file_and_shows_every_number(tmp_path: Path) -> None:
    found = results(tolerance=0.05)
    write_report(found, tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    (source,) = page.sources
    assert source.startswith("data:image/png;base64,")
    assert base64.b64decode(source.split(",")[1]) == (tmp_path / "curve.png").read_bytes()
    assert not {"b", "i", "u", "script", "link"} & set(page.tags)  # names in the data are no markup
    assert "&lt;b&gt;runs &amp; co&lt;/b&gt;" in text
    rows = [[cell.strip() for cell in page.cells[i : i + 7]] for i in range(0, 28, 7)]
    assert [row[0] for row in rows] == ["rate", "0", "0.5", "0.8 *"]
    assert [row[1].split()[0] for row in rows[1:]] == ["90.0", "90.0", "60.0"]
    assert [row[3] for row in rows[1:]] == ["-", "within", "outside"]
    assert [row[4:] for row in rows[1:]] == [
        ["100%", "100%", "3.0 GiB"], ["50%", "50%", "3.0 GiB"], ["19%", "20%", "3.0 GiB"],
    ]  # fmt: skip
    assert "recommended rate 0.5" in text
    assert "gone.mp4" in text
    assert "<u>motion</u>" in page.cells


def test_the_figure_marks_points_and_is_the_same_each_time() -> None:
    found = results()
    picture = draw(found)
    image = Image.open(io.BytesIO(picture))
    assert image.size == (1440, 604)
    assert picture == draw(found)
    found["models"][0]["points"][2]["first_unit_only"] = 0.0
    assert picture != draw(found)


def test_the_terminal_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    show_results(results(tolerance=0.05), "runs/x/eval", Console(width=200))
    said = capsys.readouterr().out
    assert "recommended rate 0.5, shown to lose no more than 5.0% of the dense accuracy." in said
    assert "only the first temporal unit of a video is left at 0.8 (100%)" in said
    assert "results: runs/x/eval" in said
    nothing = results()
    for point in nothing["models"][0]["points"][1:]:
        point["shown_tolerance"] = None
    nothing["models"][0]["recommended"] = None
    show_results(nothing, "runs/x/eval", Console(width=200))
    assert "at rate 0 it answers nothing right" in capsys.readouterr().out
    show_results(results(tolerance=0.001), "runs/x/eval", Console(width=200))
    assert re.search(r"no rate is shown .* 0.5: 4.\d%, 0.8: ", capsys.readouterr().out)


RECORD = {"seed": 1, "num_steps": 3, "recipe": {"evs": {}}}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / RECORD_FILE).write_text(json.dumps(RECORD))
    return tmp_path


def write_results(folder: Path, recommended: float | None, run: str | None, **keys: Any) -> None:
    folder.mkdir(exist_ok=True)
    model = {"run": run, "recommended": recommended, "points": [{"rate": 0.5, "shown_tolerance": 0.034}], **keys}
    (folder / "results.json").write_text(json.dumps({"models": [model]}))


def test_an_evaluation_recommends_a_rate_for_its_own_run(run_folder: Path, tmp_path: Path) -> None:
    own = run_identity(RECORD | {"video_pruning_rate": 0.7})
    write_results(run_folder / "eval", 0.75, own)
    assert recommended_rate(run_folder) == 0.75
    write_results(tmp_path / "elsewhere", 0.5, own)
    assert recommended_rate(run_folder, tmp_path / "elsewhere") == 0.5


@pytest.mark.parametrize(
    ("recommended", "run", "message"),
    [
        (0.75, "another", "is not of an export of"),
        (None, "own", r"recommends none; the loss shown not to be exceeded is 0.5: 3.4%"),
        ("nothing", None, "is not there.*first evs-train eval"),
    ],
)
def test_no_rate_is_taken_that_was_not_found_for_this_run(
    run_folder: Path, recommended: Any, run: str | None, message: str
) -> None:
    if recommended != "nothing":
        own = run_identity(RECORD)
        write_results(run_folder / "eval", recommended, own if run == "own" else run)
    with pytest.raises(RecipeError, match=message):
        recommended_rate(run_folder)


def test_an_evaluation_in_which_nothing_was_right_says_so(run_folder: Path) -> None:
    write_results(run_folder / "eval", None, run_identity(RECORD))
    file = run_folder / "eval" / "results.json"
    results = json.loads(file.read_text())
    for point in results["models"][0]["points"]:
        point["shown_tolerance"] = None
    file.write_text(json.dumps(results))
    with pytest.raises(RecipeError, match="recommends none; at rate 0 it answers nothing right"):
        recommended_rate(run_folder)


def test_export_writes_the_recommended_rate(
    tiny_checkpoint: Callable[[str], Path], world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run, its export, an evaluation of that, and the export at the rate it recommends."""
    from evs_train.uptrain import Run

    output = tmp_path / "run"
    Run(recipe_of(arguments(tiny_checkpoint("qwen3_vl"), world, output, train__steps=1))).train()
    assert main(["export", f"run={output}", "rate=recommended"]) == 2
    assert "first evs-train eval" in capsys.readouterr().err
    assert main(["export", f"run={output}", "rate=0.7"]) == 0
    clips = [str(world.parent / "clips" / f"{number:06d}.mp4") for number in range(12)]
    rows = [{"video": clip, "question": "?", "options": ["a", "b"], "answer": "A"} for clip in clips]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = ["eval", f"model={output / 'export'}", f"data={tmp_path / 'rows.json'}", "rates=[0.25,0.5]", "timed=0"]
    assert main([*words, "tolerance=1", "device=cpu", "dtype=float32"]) == 0
    found = json.loads((output / "eval" / "results.json").read_text())["models"][0]
    recommended = found["recommended"]
    if recommended is None:  # the random model may answer none of them
        found["recommended"] = recommended = 0.25
        (output / "eval" / "results.json").write_text(json.dumps({"models": [found]}))
    assert main(["export", f"run={output}", "rate=recommended"]) == 0
    assert json.loads((output / "export" / "config.json").read_text())["video_pruning_rate"] == recommended
    assert json.loads((output / "export" / EXPORT_RECORD).read_text())["video_pruning_rate"] == recommended
    assert main(["export", f"run={output}", "rate=recommended", f"eval={tmp_path / 'gone'}"]) == 2
