"""What an evaluation prints for a person: a table of each model's curve, and the sentences that say what it means.

The same sentences stand in the report (`report.py`). Nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from evs_train.evaluate.options import EvalOptions
from evs_train.redaction import redact

COLUMNS = ("rate", "accuracy, %", "to dense, points", "tolerance", "tokens", "prefill", "GPU")


def show_results(results: dict[str, Any], folder: str, console: Console) -> None:
    """Print the curves, what was found, and where the results are."""
    data = results["data"]
    console.print(f"{data['num_questions']:,} questions about {data['num_videos']:,} videos")
    for model in results["models"]:
        rows = list(rows_of_table(model))
        shown = len(COLUMNS) if any(row[-1] != "-" for row in rows) else len(COLUMNS) - 1  # no GPU, no column
        table = Table(*COLUMNS[:shown], title=model["name"], box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for row in rows:
            table.add_row(*row[:shown])
        console.print(table)
    for sentence in sentences(results):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    console.print(f"results: {redact(folder)}", markup=False, highlight=False, soft_wrap=True)


def rows_of_table(model: dict[str, Any]) -> Iterator[list[str]]:
    """The cells of `COLUMNS` for each point of a model's curve."""
    for point in model["points"]:
        prefill = point.get("prefill", {})
        peak = prefill.get("peak_bytes")
        share = point["retained_share"]
        tokens = f"{share:.0%}" if share is not None else "-"
        if "selected_share" in point:
            tokens += f", then {point['selected_share']:.0%}"
        mark = " *" if point["first_unit_only"] else ""
        yield [
            f"{point['rate']:g}{mark}",
            interval(point["accuracy"]),
            interval(point["difference"], signed=True) if "difference" in point else "-",
            point.get("tolerance", "-"),
            tokens,
            f"{prefill['of_dense']:.0%}" if prefill else "-",
            f"{peak / 2**30:.1f} GiB" if peak else "-",
        ]


def sentences(results: dict[str, Any]) -> Iterator[str]:
    """What the results say, one sentence each."""
    options = EvalOptions.model_validate(results["options"])
    for model in results["models"]:
        yield from _of_model(model, options)
    for one in results["comparisons"]:
        first, second = (results["models"][one[key]]["name"] for key in ("against", "model"))
        yield (
            f"At rate {one['rate']:g}, {second} against {first}: {interval(one['difference'], signed=True)} points, "
            f"{one['gained']} answers gained, {one['lost']} lost, p = {one['p_value']:.2g} (sign-flip test by video)."
        )
    if results["skipped"]:
        yield f"{len(results['skipped'])} questions were left out; the results name them and why."


def _of_model(model: dict[str, Any], options: EvalOptions) -> Iterator[str]:
    name, points = model["name"], model["points"]
    marked = [f"{point['rate']:g}" for point in points if point["first_unit_only"]]
    if model["unfinished"]:
        rates = ", ".join(f"{rate:g}" for rate in model["unfinished"])
        yield f"{name}: not all questions are answered yet at {rates}."
    if marked:
        shares = ", ".join(f"{p['rate']:g} ({p['first_unit_only']:.0%})" for p in points if p["first_unit_only"])
        yield (
            f"* {name}: only the first temporal unit of a video is left at {shares} of the questions: "
            "nothing that happens later can be seen."
        )
    yield from _recommendation(model, options)
    for point in points:
        if "proof" in point:
            counts = ", ".join(f"{number} {verdict}" for verdict, number in point["proof"].items())
            yield f"{name}, rate {point['rate']:g}: by its count of prompt tokens {counts}. {PROOFS[_worst(point)]}"
        elif point.get("same_tokens_as_dense"):
            yield f"{name}, rate {point['rate']:g}: it counts as many prompt tokens as at rate 0. {PROOFS['ignored']}"


PROOFS = {
    "ignored": "The server does NOT prune: it ignored the setting.",
    "other": (
        "That is neither the dense nor the pruned count: the server samples or resizes videos otherwise than is "
        "assumed here (fps, num_frames, video_kwargs), so it is not shown that it prunes."
    ),
    "pruned": "The server prunes as it should.",
    "dense": "The server does not prune, as it should not.",
}
"""What the worst of a server's counts means."""


def _worst(point: dict[str, Any]) -> str:
    return next(name for name in PROOFS if name in point["proof"])


def _recommendation(model: dict[str, Any], options: EvalOptions) -> Iterator[str]:
    judged = [point for point in model["points"] if "tolerance" in point]
    if not judged:
        return
    limit = f"{options.tolerance:.1%} of the dense accuracy"
    if model["recommended"] is not None:
        lower = [p for p in judged if p["rate"] < model["recommended"] and p["tolerance"] != "within"]
        told = ", ".join("{:g} is {}".format(p["rate"], p["tolerance"]) for p in lower)
        gaps = f" Of the lower rates {told}." if lower else ""
        yield f"{model['name']}: recommended rate {model['recommended']:g}, shown to lose no more than {limit}.{gaps}"
        return
    needed = [f"{p['rate']:g}: {p['shown_tolerance']:.1%}" for p in judged if p["shown_tolerance"] is not None]
    if not needed:
        yield f"{model['name']}: no rate is recommended: at rate 0 it answers nothing right."
        return
    yield (
        f"{model['name']}: no rate is shown to lose no more than {limit}. What is shown of each: {', '.join(needed)}. "
        "More videos narrow this; tolerance=... sets another limit without asking again."
    )


def interval(estimate: dict[str, Any], *, signed: bool = False) -> str:
    """In percent or points, with the ends of the 95 % interval."""
    form = "{:+.1f} [{:+.1f}, {:+.1f}]" if signed else "{:.1f} [{:.1f}, {:.1f}]"
    return form.format(*(100 * estimate[key] for key in ("value", "low", "high")))
