"""Group `packing`: rows of very different length in real steps: padded or packed, so many rows or a budget of tokens.

Every side trains on the same rows once, each micro-batch a step of its own, and counts its steps' seconds (a budget may
take some rows of the next pass before the last ones of this). *useful* are the tokens of the rows after pruning;
padding is computed and not counted, so useful tokens per second tell what a batch gains by fitting. *largest* is the
largest micro-batch, padding included, which memory must hold: a budget has the size of the longest row, so that row
alone needs no more, while four rows need several times that. So compare the sides of one *largest* first.

The mix: durations follow a log-normal distribution, as in `benchmarks/batches.py`, which counts tokens of many rows and
ranks without computing them. Outside flash attention a packed batch computes attention between all its rows, hidden by
a mask of its length squared (docs/decisions.md); long packed batches lose there what they save in padding.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.perf.harness import Bench, Column, Group, Row, Size, Spread, alternate
from benchmarks.perf.runs import Scripted, ScriptedRun, Step, StepClock, Workload
from benchmarks.perf.shapes import CPU_NARROW, QWEN_2B, TOY, Shape
from evs_train.data.budget import Budget, BudgetBatches
from evs_train.data.lengths import Length, PlannedRow
from evs_train.data.schedule import FixedBatches, Schedule

SIGMA = 1.0  # half of the rows are within a factor of 2 of the median, one in a hundred is 10 times as long
RATE = 0.75
GIB = 2**30


@dataclass(frozen=True)
class Batching:
    """How rows become micro-batches: `rows` of them, or a budget of the longest row's tokens where that is None."""

    name: str
    rows: int | None
    packing: bool


BATCHINGS = (
    Batching("1 row", 1, packing=False),
    Batching("4 rows, padded", 4, packing=False),
    Batching("4 rows, packed", 4, packing=True),
    Batching("budget, padded", None, packing=False),
    Batching("budget, packed", None, packing=True),
)


@dataclass(frozen=True)
class Plan:
    """What a size measures: a multiple of four rows, of `median` frames in the middle and from `least` to `most`."""

    shape: Shape
    rows: int
    least: int
    median: int
    most: int
    rounds: int
    batchings: tuple[Batching, ...]


PLANS: dict[Size, Plan] = {
    "toy": Plan(TOY, 4, 4, 6, 12, 1, (BATCHINGS[0], BATCHINGS[-1])),
    "cpu": Plan(CPU_NARROW, 24, 4, 16, 96, 3, BATCHINGS),
    "gpu": Plan(QWEN_2B, 64, 8, 32, 256, 4, BATCHINGS),
}
BASE = BATCHINGS[0]
PASSES = 50  # a budget plans ahead; more than it looks at


def run(bench: Bench) -> list[Row]:
    """A row for each way to batch."""
    plan = PLANS[bench.size]
    bench.say(f"packing: {plan.shape.name}, {plan.rows} rows")
    sides = {one.name: Mix(plan, one, bench) for one in plan.batchings}
    of_all: Row = {"model": plan.shape.name, "rate": RATE}
    rows: list[Row] = []
    for name, side in list(sides.items()):  # a turn that does not count, and shows what memory can hold
        if not fits(side):
            rows.append(of_all | {"batches": name} | sides.pop(name).figures() | {"note": "out of memory"})
    seconds = alternate(sides, plan.rounds, warmup=0)
    for name, side in sides.items():
        speed = Spread.of([side.useful / one for one in seconds[name]])
        rows.append(of_all | {"batches": name} | side.figures() | {"tokens_per_second": speed})
        if BASE.name in sides:
            more = side.useful / sides[BASE.name].useful
            pairs = zip(seconds[name], seconds[BASE.name], strict=True)
            rows[-1]["gain"] = Spread.of([more * base / one for one, base in pairs])
    return rows


def fits(side: Mix) -> bool:
    """Whether one turn of it goes through."""
    try:
        side()
    except torch.OutOfMemoryError:
        fit = False
    else:
        fit = True
    if not fit:  # here the error, which holds the step's tensors, is gone
        gc.collect()
        torch.cuda.empty_cache()
    return fit


def frames_of(plan: Plan) -> list[int]:
    """Frames of each row; even, since two make a temporal unit."""
    drawn = np.random.default_rng(0).lognormal(np.log(plan.median), SIGMA, plan.rows)
    return [int(one) // 2 * 2 for one in np.clip(drawn, plan.least, plan.most)]


class Mix:
    """One side: called, it trains on all rows once and returns the seconds of its steps."""

    def __init__(self, plan: Plan, batching: Batching, bench: Bench) -> None:
        self.plan, self.batching, self.bench = plan, batching, bench
        work = Workload(plan.shape, "full", checkpointing=bench.device.type == "cuda")
        self.run = ScriptedRun(work, [Step((one,), RATE) for one in frames_of(plan)], bench)  # a row a draw
        self.run.collator = dataclasses.replace(self.run.collator, packing=batching.packing)
        rows = tuple(self.run.order.row(draw) for draw in range(plan.rows))
        self.run.order = Scripted(self.run.order.num_rows, self.run.order.seed, rows=rows * PASSES)
        self.run.schedule = self.schedule()
        self.batches = self.run.plan_batches(self.run.schedule.num_steps)
        self.peak = 0

    def __call__(self) -> float:
        clock = StepClock(self.bench.device)
        trainer = self.run.build_trainer()
        trainer.add_callback(clock)
        trainer.train()
        self.peak = max((step.peak for step in clock.steps if step.peak is not None), default=0)
        del trainer
        gc.collect()
        return sum(step.seconds for step in clock.steps if step.seconds is not None)

    def schedule(self) -> Schedule:
        """Which rows each step reads."""
        if self.batching.rows is not None:
            return FixedBatches(-(-self.plan.rows // self.batching.rows), 1, self.batching.rows)
        lengths = [Length.of(self.run.reader.read(number)) for number in range(len(self.run.samples))]
        rows = [PlannedRow(str(number), f"row {number}", (one,), is_whole=True) for number, one in enumerate(lengths)]
        longest = max(one.retained_tokens(lambda units: RATE) for one in lengths)
        budget = Budget(longest, packing=self.batching.packing)
        rates, order = self.run.collator.rates, self.run.order
        return BudgetBatches(rows, order, rates, budget, per_step=1, at_once=1, num_draws=self.plan.rows)

    @property
    def useful(self) -> int:
        """Tokens of all rows after pruning."""
        return sum(sum(plan.num_tokens) for plan in self.batches)

    def figures(self) -> Row:
        """What its batches are."""
        computed = [plan.shape[0] * plan.shape[1] for plan in self.batches]
        row: Row = {
            "rows": sum(len(plan.draws) for plan in self.batches),
            "steps": len(computed),
            "useful": self.useful,
            "largest": max(computed),
            "padding": 1 - self.useful / sum(computed),
        }
        return row | ({"peak_gib": self.peak / GIB} if self.peak else {})


COLUMNS = (
    Column("model", "model"),
    Column("rate", "rate", "g"),
    Column("batches", "batches"),
    Column("rows", "rows"),
    Column("steps", "steps"),
    Column("largest", "largest", ","),
    Column("padding", "padding", ".0%"),
    Column("tokens_per_second", "useful tokens/s", ",.0f"),
    Column("gain", "of 1 row's", ".2f"),
    Column("peak_gib", "peak GiB", ".2f"),
    Column("note", "note"),
)


def draw(axes: Any, rows: Sequence[Row]) -> None:
    """Useful tokens per second of each way to batch."""
    rows = [row for row in rows if "tokens_per_second" in row]
    names = [row["batches"] for row in rows]
    rates = [row["tokens_per_second"] for row in rows]
    errors = [[one["median"] - one["lower"] for one in rates], [one["upper"] - one["median"] for one in rates]]
    axes.bar(range(len(names)), [one["median"] for one in rates], yerr=errors)
    axes.set_xticks(range(len(names)), names, rotation=20, fontsize=6)
    axes.set_ylabel("useful tokens per second")


GROUP = Group("rows of very different length", run, COLUMNS, draw)
