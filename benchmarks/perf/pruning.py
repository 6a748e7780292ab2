"""Group `pruning`: what choosing and moving tokens costs itself, as a share of the step that it makes shorter.

*pruning* is the device half alone: scores, choice, compaction, the arguments of the model's forward and, where the
encoder trains, the gradient of the retained features (`device_half.py`). *share* is that over the step of the same
round. *launched* counts its kernels; on a CPU its operations, without views. *waits* counts where the host waits for
the device: it must be 0. *of the step* is what the whole step has of them, all others being transformers' and
accelerate's. On a CPU they are those operations that would make the host wait for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.perf.device_half import Found, Way, measure
from benchmarks.perf.harness import Bench, Column, Group, Row, Size, Spread, ratio
from benchmarks.perf.runs import Step, Workload
from benchmarks.perf.shapes import CPU, QWEN_2B, TOY, TOY_NEMOTRON, nemotron, qwen3_vl_8b

RATES = (0.0, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Plan:
    """What a size measures."""

    works: tuple[Workload, ...]
    frames: tuple[int, ...]
    rates: tuple[float, ...]
    rounds: int


PLANS: dict[Size, Plan] = {
    "toy": Plan((Workload(TOY, "full"), Workload(TOY_NEMOTRON, "lora")), (8,), (0.0, 0.75), 1),
    "cpu": Plan((Workload(CPU, "full"),), (32,), RATES, 3),
    "gpu": Plan(
        (
            Workload(QWEN_2B, "full"),
            Workload(qwen3_vl_8b(), "lora", checkpointing=True),
            Workload(nemotron(13), "lora", checkpointing=True),
        ),
        (64, 256),
        RATES,
        10,
    ),
}


def run(bench: Bench) -> list[Row]:
    """A row for each model, number of frames and rate."""
    plan = PLANS[bench.size]
    rows = []
    for work in plan.works:
        for frames in plan.frames:
            bench.say(f"pruning: {work.shape.name}, {frames} frames")
            found = measure(work, [Way(Step((frames,), rate)) for rate in plan.rates], plan.rounds, bench)
            of_setting: Row = {"model": work.shape.name, "tuning": work.tuning, "frames": frames}
            rows += [of_setting | {"rate": rate} | figures(one) for rate, one in zip(plan.rates, found, strict=True)]
    return rows


def figures(found: Found) -> Row:
    """What was measured, for the table and the JSON file."""
    return {
        "computed": found.computed,
        "kept": found.seen,
        "seconds": Spread.of(found.seconds),
        "pruning_ms": Spread.of([1000 * one for one in found.half_seconds]),
        "share": ratio(found.half_seconds, found.seconds),
        "launched": found.launched,
        "waits": len(found.waits),
        "step_waits": len(found.step_waits),
        "waits_at": sorted(set(found.waits)),
    }


COLUMNS = (
    Column("model", "model"),
    Column("tuning", "tuning"),
    Column("frames", "frames"),
    Column("rate", "rate", "g"),
    Column("kept", "tokens", ","),
    Column("seconds", "step, s", ".3f"),
    Column("pruning_ms", "pruning, ms", ".2f"),
    Column("share", "share", ".2%"),
    Column("launched", "launched"),
    Column("waits", "waits"),
    Column("step_waits", "of the step"),
)


def draw(axes: Any, rows: Sequence[Row]) -> None:
    """Share of the step against rate, a line for each setting."""
    settings = {(row["model"], row["frames"]) for row in rows}
    for model, frames in sorted(settings):
        of_line = [row for row in rows if (row["model"], row["frames"]) == (model, frames)]
        shares = [100 * row["share"]["median"] for row in of_line]
        axes.plot([row["rate"] for row in of_line], shares, marker="o", label=f"{model}, {frames} frames")
    axes.axhline(1, color="grey", linestyle=":")
    axes.set_xlabel("pruning rate")
    axes.set_ylabel("% of the step")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=6)


GROUP = Group("choosing and moving tokens, as a share of the step", run, COLUMNS, draw)
