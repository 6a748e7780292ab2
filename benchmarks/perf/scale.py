"""Group `scale`: time and memory of a step against the length of the clip, dense and pruned.

Clips of growing length are shown to one model, dense and pruned in turns. Over the longer half of the lengths a power
law is fitted to the time, and one to the memory that comes on top of what the model holds by itself (weights and
optimizer): straight lines through the logarithms, by least squares. The exponent says how cost grows: 1 where matrices
dominate, towards 2 where attention does. The largest clip that a given memory holds is read off that line, hence an
extrapolation where it is beyond the longest clip measured; it holds for this model and these settings only.
"""

from __future__ import annotations

import gc
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.perf.harness import Bench, Column, Group, Row, Size, Spread, bytes_of
from benchmarks.perf.limit import tokens_of
from benchmarks.perf.runs import Measured, ScriptedRun, Step, StepClock, Workload, estimate, expected_peak, held_by
from benchmarks.perf.shapes import CPU_NARROW, QWEN_2B, TOY

RATES = (0.0, 0.75)
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What a size measures: model, lengths, rounds that are timed, and memories in GiB that clips should fit."""

    work: Workload
    frames: tuple[int, ...]
    rounds: int
    memories: tuple[int, ...]


PLANS: dict[Size, Plan] = {
    "toy": Plan(Workload(TOY, "full"), (8, 16, 32), 1, (4,)),
    "cpu": Plan(Workload(CPU_NARROW, "full"), (8, 16, 32, 64, 128, 256, 512), 3, (4, 16)),
    "gpu": Plan(Workload(QWEN_2B, "lora", checkpointing=True), (8, 16, 32, 64, 128, 256, 512, 1024), 3, (24, 80, 141)),
}


@dataclass(frozen=True)
class Law:
    """`value = factor * frames ** exponent`."""

    factor: float
    exponent: float

    @classmethod
    def through(cls, frames: Sequence[int], values: Sequence[float]) -> Law:
        """The straight line through the logarithms of the longer half of at least two lengths."""
        first = min(len(frames) // 2, len(frames) - 2)
        exponent, constant = np.polyfit(np.log(frames[first:]), np.log(values[first:]), 1)
        return cls(math.exp(constant), float(exponent))

    def frames_for(self, value: float) -> int:
        """Where the line reaches a value."""
        return int((value / self.factor) ** (1 / self.exponent))


def run(bench: Bench) -> list[Row]:
    """A row for each length and rate, then one for each rate with what was fitted."""
    plan = PLANS[bench.size]
    rows: list[Row] = []
    left = [Step((frames,), rate) for frames in plan.frames for rate in RATES]
    while left:
        done, estimates, held = _measure(plan, left, bench)
        rows += [_row_of(step, measured, plan) | {"estimate_gib": estimates[step]} for step, measured in done.items()]
        if len(done) == len(left):
            break
        refused = left[len(done)]  # memory was too small for it; longer clips at its rate need not be tried
        rows.append(_named(plan, refused.rate) | {"frames": refused.frames[0], "note": "out of memory"})
        left = [step for step in left[len(done) + 1 :] if step.rate != refused.rate]
    fits = [_fit(rate, [row for row in rows if row["rate"] == rate and "seconds" in row], held, plan) for rate in RATES]
    return sorted(rows, key=lambda row: (row["rate"], row["frames"])) + [row for row in fits if row]


def _measure(
    plan: Plan, steps: Sequence[Step], bench: Bench
) -> tuple[dict[Step, list[Measured]], dict[Step, float], int]:
    """Steps that memory sufficed for, in order.

    Also what `evs-train check` says of the memory of every step (GiB), and the bytes that model and optimizer hold.
    """
    bench.say(f"scale: {plan.work.shape.name}, up to {max(step.frames[0] for step in steps)} frames")
    script: list[Step] = []
    weighed: list[int] = []
    for frames in sorted({step.frames for step in steps}):
        of_length = [step for step in steps if step.frames == frames]
        for number in range(1 + plan.rounds):
            script += of_length if number % 2 == 0 else of_length[::-1]
        weighed += range(len(script), len(script) + len(of_length))
        script += of_length
    run_ = ScriptedRun(plan.work, script, bench)
    clock = StepClock(bench.device, weighed)
    trainer = run_.build_trainer()
    trainer.add_callback(clock)
    try:
        trainer.train()
    except torch.OutOfMemoryError:
        bench.say("scale: out of memory")
    held = bytes_of(held_by(trainer.model, trainer.optimizer))
    plans = dict(zip(script, run_.plan_batches(len(script)), strict=True))
    estimates = {
        step: expected_peak(estimate(run_, trainer.model, tokens_of([of_step], run_.family)), bench.device)
        for step, of_step in plans.items()
    }
    del trainer
    gc.collect()
    torch.cuda.empty_cache()
    measured: dict[Step, list[Measured]] = defaultdict(list)
    for step, one in zip(script, clock.steps, strict=False):
        measured[step].append(one)
    whole = 2 + plan.rounds
    return {step: measured[step] for step in steps if len(measured[step]) == whole}, estimates, held


def _named(plan: Plan, rate: float) -> Row:
    return {"model": plan.work.shape.name, "tuning": plan.work.tuning, "rate": rate}


def _row_of(step: Step, measured: Sequence[Measured], plan: Plan) -> Row:
    seconds = [one.seconds for one in measured[1 : 1 + plan.rounds] if one.seconds is not None]
    (frames,) = step.frames
    return _named(plan, step.rate) | {
        "frames": frames,
        "seconds": Spread.of(seconds),
        "peak_gib": max(one.peak for one in measured if one.peak is not None) / GIB,
    }


def _fit(rate: float, rows: Sequence[Row], held: int, plan: Plan) -> Row:
    """What is fitted to the rows of one rate; nothing if they are fewer than two."""
    if len(rows) < 2:
        return {}
    frames = [row["frames"] for row in rows]
    time = Law.through(frames, [row["seconds"].median for row in rows])
    memory = Law.through(frames, [row["peak_gib"] - held / GIB for row in rows])
    largest = {str(gib): memory.frames_for(gib - held / GIB) for gib in plan.memories if gib > held / GIB}
    fits = ", ".join(f"{gib} GiB: {count:,} frames" for gib, count in largest.items())
    return _named(plan, rate) | {
        "held_gib": held / GIB,
        "time_exponent": time.exponent,
        "memory_exponent": memory.exponent,
        "largest": largest,
        "note": f"{fits} (from the fit)",
    }


COLUMNS = (
    Column("model", "model"),
    Column("tuning", "tuning"),
    Column("rate", "rate", "g"),
    Column("frames", "frames"),
    Column("seconds", "seconds", ".3f"),
    Column("peak_gib", "peak GiB", ".2f"),
    Column("estimate_gib", "estimate", ".2f"),
    Column("time_exponent", "time ~ frames^", ".2f"),
    Column("memory_exponent", "memory ~ frames^", ".2f"),
    Column("note", "note"),
)


def draw(axes: Any, rows: Sequence[Row]) -> None:
    """Seconds (left) and peak memory (right, dashed) against frames, both logarithmic."""
    right = axes.twinx()
    for rate in RATES:
        measured = [row for row in rows if row["rate"] == rate and "seconds" in row]
        frames = [row["frames"] for row in measured]
        (line,) = axes.plot(frames, [row["seconds"]["median"] for row in measured], marker="o", label=f"rate {rate:g}")
        right.plot(frames, [row["peak_gib"] for row in measured], "--", marker=".", color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    right.set_yscale("log")
    axes.set_xlabel("frames")
    axes.set_ylabel("seconds of a step")
    right.set_ylabel("peak memory, GiB (dashed)")
    axes.legend(fontsize=7)


GROUP = Group("a step against the length of the clip", run, COLUMNS, draw)
