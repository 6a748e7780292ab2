"""What `evs-train check` prints for a person, and its progress bars (on stderr)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from evs_train.check import PERCENTILES, Report
from evs_train.console import parts_table
from evs_train.redaction import redact

SHOWN_REFUSED = 50
SHOWN_PIECE = 2000


def watched(what: str, total: int, items: Iterable[Any]) -> Iterator[Any]:
    """The items, under a progress bar on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield from progress.track(items, total=total, description=what)


def show_report(report: Report, console: Console) -> None:
    """Print everything of a report."""
    console.print(_counts_table(report))
    console.print(_percentile_table(report))
    console.print(_tokens_table(report))
    console.print(parts_table(report.parts))
    memory = report.memory
    batch = "a micro-batch of the longest rows, unpruned" if report.usage is None else "a full micro-batch"
    console.print(
        f"Estimated memory per GPU with {memory.num_processes} process(es), in GiB: weights {memory.weights:.1f}, "
        f"gradients {memory.gradients:.1f}, optimizer {memory.optimizer:.1f}, pixels {memory.inputs:.1f}, and roughly "
        f"{memory.activations:.1f} for activations on {batch} ({memory.num_tokens:,} tokens, {memory.num_patches:,} "
        f"patches in the vision tower, logits for {memory.num_logits:,}); at most {memory.total:.1f} together. Not "
        "counted: communication buffers, fragmentation.",
        highlight=False,
    )
    console.print(f"{report.num_steps} steps of {report.step}. Index: {redact(report.index)}", soft_wrap=True)
    if report.usage is not None:
        usage = report.usage
        console.print(
            f"{report.rows_per_step:.1f} rows in a step; {usage.fill:.1%} of the budget is used, {usage.padding:.1%} "
            "of what is computed is padding, and the largest of the micro-batches computed at the same time is "
            f"{usage.imbalance:.1%} above their mean. {usage.shortened} draws lose frames, {usage.replaced} show "
            "another row because theirs is refused or too long.",
            highlight=False,
        )
    if report.feature_cache_gib is not None:
        console.print(
            f"What the frozen vision tower says of all media takes at most {report.feature_cache_gib:.3g} GiB on disk "
            "(data.cache_features).",
            highlight=False,
        )
    if report.labels:
        console.print("\nOne row; what is trained on is green:")
        console.print(_labels_text(report))
    _show_refused(report, console)


def _counts_table(report: Report) -> Table:
    table = Table(show_header=False, title="data")
    for name, count in report.counts.items():
        table.add_row(name.replace("_", " "), f"{count:,}")
    for backend, count in report.backends.items():
        table.add_row("videos decoded by", f"{backend}: {count:,}")
    if report.seconds:
        table.add_row("hours of video", f"{report.seconds['total'] / 3600:.2f}")
    table.add_row("tokens that are trained on", f"{report.supervised_share:.1%}")
    for sample_id, num_tokens in report.longest:
        table.add_row("longest rows", f"{sample_id}: {num_tokens:,} tokens")
    return table


def _percentile_table(report: Report) -> Table:
    names = [str(p) for p in PERCENTILES]
    table = Table("percentile", *names)
    if report.seconds:
        table.add_row("seconds of a video", *(f"{report.seconds[p]:.1f}" for p in names))
        table.add_row("pixels of a video", *("x".join(map(str, report.resolutions[p])) for p in names))
    if report.row_tokens:
        table.add_row("tokens of a row, unpruned", *(f"{report.row_tokens[p]:,}" for p in names))
    return table


def _tokens_table(report: Report) -> Table:
    table = Table("evs.rate", "video tokens", "all tokens", title="one pass over the rows")
    for rate, tokens in report.tokens.items():
        table.add_row(rate, f"{tokens['video_tokens']:,}", f"{tokens['all_tokens']:,}")
    return table


def _labels_text(report: Report) -> Text:
    text = Text()
    for piece, trained in report.labels:
        shown = piece if len(piece) <= SHOWN_PIECE else f"{piece[:SHOWN_PIECE]} ..."
        text.append(shown, style="bold green" if trained else "dim")
    return text


def _show_refused(report: Report, console: Console) -> None:
    if not report.refused:
        console.print("\nNo row is refused.")
        return
    reasons = Counter(one.reason for one in report.refused).most_common()
    console.print(f"\n{len(report.refused)} rows are refused: {', '.join(f'{reason} {n}' for reason, n in reasons)}")
    for one in report.refused[:SHOWN_REFUSED]:
        console.print(
            f"  {redact(one.row)}: {redact(one.message)} [{one.reason}]", markup=False, highlight=False, soft_wrap=True
        )
    if len(report.refused) > SHOWN_REFUSED:
        console.print(f"  ... and {len(report.refused) - SHOWN_REFUSED} more (all of them with --json)")
