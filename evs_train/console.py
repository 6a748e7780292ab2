"""What a run prints for a person: the plan of a dry run, what is trained, and the closing table."""

from __future__ import annotations

from collections.abc import Sequence

import yaml
from rich.console import Console
from rich.table import Table

from evs_train import samplers
from evs_train.collate import BatchPlan
from evs_train.config import Recipe
from evs_train.data.quarantine import QUARANTINE_FILE
from evs_train.export import Export
from evs_train.models.tuning import PartSize
from evs_train.redaction import redact
from evs_train.serving import caveat
from evs_train.uptrain import Run, Summary

_PLANNED_BATCHES = 2


def show_dry_run(run: Run, console: Console) -> None:
    """Print the resolved recipe, the trainable parameters, the rates and the plan of the first batches."""
    console.print(
        yaml.safe_dump(redact(run.recipe.model_dump()), sort_keys=False), markup=False, highlight=False, soft_wrap=True
    )
    show_parts(run, run.part_sizes(), console)
    rates = samplers.describe(run.sampler)
    console.print(f"pruning rates: {rates}", markup=False, highlight=False, soft_wrap=True)
    steps = f"{run.schedule.num_steps} steps of {run.schedule.describe()}"
    console.print(f"{len(run.samples)} rows, {steps}; the first micro-batches:", highlight=False, soft_wrap=True)
    console.print(plan_table(run.plan_batches(_PLANNED_BATCHES)))


def show_parts(run: Run, parts: Sequence[PartSize], console: Console) -> None:
    """Print what is read and trained, and what adapters do not reach."""
    for line in run.data.describe():
        console.print(f"data: {redact(line)}", markup=False, highlight=False, soft_wrap=True)
    console.print(parts_table(parts))
    tuning = run.recipe.tuning
    if run.family.lora_note and tuning.method == "lora" and "language_model" in tuning.lora.parts:
        console.print(run.family.lora_note, soft_wrap=True)


def parts_table(parts: Sequence[PartSize]) -> Table:
    """Parameters by part."""
    table = Table("part", "trainable", "of", title="parameters")
    for part in parts:
        table.add_row(part.part, f"{part.trainable:,}", f"{part.total:,}")
    table.add_row("all", f"{sum(p.trainable for p in parts):,}", f"{sum(p.total for p in parts):,}")
    return table


def plan_table(plans: Sequence[BatchPlan]) -> Table:
    """One line per row of each planned batch."""
    table = Table("step", "row", "rate", "videos: units x tokens, kept", "images", "tokens", "of", "trained on")
    for plan in plans:
        for row, sample_id in enumerate(plan.sample_ids):
            videos = [p for p in plan.videos if p.row == row]
            table.add_row(
                str(plan.step),
                sample_id,
                f"{plan.rates[row]:.3f}",
                ", ".join(f"{v.item.num_units}x{v.item.tokens_per_unit}, {v.num_retained}" for v in videos) or "-",
                str(sum(p.row == row and p.item.kind == "image" for p in plan.items)),
                str(plan.num_tokens[row]),
                str(plan.shape[1]),
                str(plan.num_supervised[row]),
            )
    return table


def show_summary(recipe: Recipe, summary: Summary, export: Export | None, console: Console) -> None:
    """Print the closing table and the commands that serve what was exported."""
    table = Table(show_header=False, title=f"{recipe.recipe}: done in {summary.seconds:.0f} s of training")
    table.add_row("steps", str(summary.steps))
    table.add_row("loss, first and last logged", f"{summary.first_loss:.4f} -> {summary.last_loss:.4f}")
    table.add_row("mean pruning rate", f"{summary.mean_rate:.3f}")
    table.add_row(
        "video tokens, before and after", f"{summary.video_tokens_before:,} -> {summary.video_tokens_after:,}"
    )
    table.add_row("tokens/s (after pruning)", f"{summary.tokens_per_second:,.0f}")
    if summary.quarantined:
        reasons = ", ".join(f"{reason} {count}" for reason, count in summary.quarantined.items())
        table.add_row("bad samples replaced", redact(f"{reasons}; see {recipe.output_dir}/{QUARANTINE_FILE}"))
    table.add_row("metrics", redact(f"{recipe.output_dir}/metrics.jsonl"))
    if export is not None:
        table.add_row("exported", redact(str(export.path)))
    console.print(table)
    if export is not None:
        console.print(f"Serve it: {caveat(export.serving)}".strip(), markup=False, highlight=False, soft_wrap=True)
        for line in export.serving:  # a note is one line, or what is copied into a shell would not be a comment
            note = f"\n# {line.engine} (reads: {line.reads}) {line.note}"
            console.print(note, markup=False, highlight=False, soft_wrap=True)
            console.print(redact(line.command), markup=False, highlight=False, soft_wrap=True)
