"""The results of an evaluation as files for people: `curve.png`, and `report.html`, which holds it and needs no other.

Invariant: everything in the page comes from the results, escaped, so a name in the data cannot become markup. Cost: a
figure, half a second. Also here: which rate an evaluation recommends, for `evs-train export`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from evs_train.checkpoint import read_record
from evs_train.errors import RecipeError
from evs_train.evaluate.console import COLUMNS, interval, rows_of_table, sentences
from evs_train.evaluate.records import run_identity

RESULTS_FILE = "results.json"
FIGURE_FILE = "curve.png"
PAGE_FILE = "report.html"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .7rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: 12px; }
"""


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Write the figure and the page into `folder`."""
    from evs_train.evaluate.figure import draw  # noqa: PLC0415 (matplotlib takes a second, and export needs none)

    picture = draw(results)
    (folder / FIGURE_FILE).write_bytes(picture)
    (folder / PAGE_FILE).write_text(page(results, picture), encoding="utf-8")


def page(results: dict[str, Any], picture: bytes) -> str:
    """The report as one HTML page, the PNG in it."""
    return "".join(f"{piece}\n" for piece in _pieces(results, base64.b64encode(picture).decode("ascii")))


def _pieces(results: dict[str, Any], picture: str) -> Iterator[str]:
    data = results["data"]
    title = f"Accuracy against pruning rate: {', '.join(model['name'] for model in results['models'])}"
    yield f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
    yield f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>"
    yield (
        f"<p>{data['num_questions']:,} questions about {data['num_videos']:,} videos of "
        f"{escape(', '.join(data['paths']))} ({escape(data['layout'])}), {escape(results['written'])}.</p>"
    )
    yield from (f"<p>{escape(sentence)}</p>" for sentence in sentences(results))
    yield f'<img alt="curves" src="data:image/png;base64,{picture}">'
    for model in results["models"]:
        yield f"<h2>{escape(model['name'])}</h2>"
        yield _table(COLUMNS, rows_of_table(model))
        yield from _types(model)
    yield (
        "<p>Intervals are 95 % intervals of a bootstrap over videos. Prefill is choosing the tokens and one forward "
        "over those kept, without the vision encoder, measured at all rates in turns on the same questions.</p>"
    )
    shown = {key: results[key] for key in ("environment", "options", "skipped")}
    yield f"<h2>How it was made</h2><pre>{escape(json.dumps(shown, indent=2))}</pre></body></html>"


def _types(model: dict[str, Any]) -> Iterator[str]:
    points = model["points"]
    of_types = points[0]["types"] if points else {}
    rows = [
        [label, str(found["num_questions"]), *(interval(point["types"][label]) for point in points)]
        for label, found in of_types.items()
    ]
    for match in ("exact", "contains"):
        free = [point["free_answers"] for point in points if "free_answers" in point]
        if free:
            shares = [f"{100 * found[match]:.1f}" for found in free]
            rows.append([f"free answers, {match}", str(free[0]["num_questions"]), *shares])
    if rows:
        yield "<h3>By type of question: accuracy, %</h3>"
        yield _table(["type", "questions", *(f"{point['rate']:g}" for point in points)], rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [_row("th", head), *(_row("td", row) for row in rows)]
    return f"<table>{''.join(lines)}</table>"


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def recommended_rate(run: str | Path, evaluation: str | Path | None = None) -> float:
    """The rate that the evaluation of a run's export recommends.

    Args:
        run: the run's folder.
        evaluation: folder of its evaluation; default: `eval` in the run's folder.

    Raises:
        RecipeError: there is no evaluation, it is of another run, or recommends none.
    """
    folder = Path(evaluation) if evaluation is not None else Path(run) / "eval"
    file = folder / RESULTS_FILE
    if not file.is_file():
        raise RecipeError(
            f"rate=recommended: {file} is not there", f"first evs-train eval model={run}/export data=... out={folder}"
        )
    record = read_record(Path(run))
    own, method = run_identity(record), record["recipe"]["evs"].get("method", "evs")
    found = [model for model in json.loads(file.read_text(encoding="utf-8"))["models"] if model["run"] == own]
    if not found:
        raise RecipeError(f"rate=recommended: {file} is not of an export of {run}", "evaluate its export first")
    found = [model for model in found if model.get("method") in (None, method)]
    if not found:
        raise RecipeError(f"rate=recommended: {file} has no curve with the run's own evs.method, {method}")
    rate = found[0]["recommended"]
    if rate is None:
        shown = [
            f"{point['rate']:g}: {point['shown_tolerance']:.1%}"
            for point in found[0]["points"]
            if point.get("shown_tolerance") is not None
        ]
        loss = (
            f"the loss shown not to be exceeded is {', '.join(shown)}"
            if shown
            else "at rate 0 it answers nothing right"
        )
        raise RecipeError(
            f"rate=recommended: {file} recommends none; {loss}",
            "evaluate on more videos, or again with a larger tolerance=...; or name a rate",
        )
    return float(rate)
