"""`evs-train eval` once its options are known: progress, tables, and the files of the results."""

from __future__ import annotations

import os

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from evs_train.evaluate.console import show_results
from evs_train.evaluate.options import EvalOptions
from evs_train.evaluate.report import write_report
from evs_train.evaluate.run import evaluate


def run(options: EvalOptions) -> int:
    """Evaluate, and print and write what was found; returns the exit code."""
    first = os.environ.get("RANK", "0") == "0"
    columns = (TextColumn("questions"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not first) as progress:
        task = progress.add_task("", total=None)
        results = evaluate(options, lambda done, total: progress.update(task, completed=done, total=total))
    if results is None:
        return 0
    write_report(results, options.folder)
    show_results(results, str(options.folder), Console())
    return 0
