"""Group `step`: what a training step costs at each pruning rate, against dense and against the limit.

The rates take turns within one run (`runs.py`). *speed-up* is the dense step of the same round over this one;
*efficiency* is the measured speed-up over the one that the limit allows (`limit.py`): 1 means that all of the gain that
pruning promises has arrived. It can exceed 1 where long sequences run less well than short ones. *MFU* is the share of
the machine's peak (measured in this run) that the step's operations make, without what is recomputed. *estimate* is
the memory that `evs-train check` would say.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.perf.harness import Bench, Column, Group, Row, Size, Spread, ratio, turns
from benchmarks.perf.limit import Cost, Tokens, cost_of, tokens_of
from benchmarks.perf.machine import Machine, measure_machine
from benchmarks.perf.runs import Measured, Plan, ScriptedRun, Step, StepClock, Workload, estimate, expected_peak
from benchmarks.perf.shapes import CPU, QWEN_2B, TOY, TOY_NEMOTRON, nemotron, qwen3_vl_8b

RATES = (0.0, 0.5, 0.75, 0.9)
GIB = 2**30


PLANS: dict[Size, Plan] = {
    "toy": Plan((Workload(TOY, "full"), Workload(TOY_NEMOTRON, "lora", checkpointing=True)), (8,), 1),
    "cpu": Plan((Workload(CPU, "full"), Workload(CPU, "lora")), (32, 64), 5),
    "gpu": Plan(
        (
            Workload(QWEN_2B, "full"),
            Workload(QWEN_2B, "lora"),
            Workload(qwen3_vl_8b(), "lora", checkpointing=True),
            Workload(qwen3_vl_8b(12), "full", checkpointing=True),
            Workload(nemotron(13), "lora", checkpointing=True),
        ),
        (64, 128, 256),
        7,
    ),
}


def run(bench: Bench) -> list[Row]:
    """A row for each model, tuning, number of frames and rate."""
    plan = PLANS[bench.size]
    dtype = torch.float32 if bench.device.type == "cpu" else torch.bfloat16
    rows = []
    for work in plan.works:
        for frames in plan.frames:
            bench.say(f"step: {work.shape.name}, {work.tuning}, {frames} frames")
            machine = measure_machine(bench.device, dtype)
            rows += _rows(work, frames, plan.rounds, machine, bench)
    return rows


def _rows(work: Workload, frames: int, rounds: int, machine: Machine, bench: Bench) -> list[Row]:
    """All rates of one setting; those of them that memory cannot hold are named and left empty."""
    of_setting: Row = {"model": work.shape.name, "tuning": work.tuning, "frames": frames}
    refused: list[Row] = []
    rates = list(RATES)
    while rates:
        found = measure(work, [Step((frames,), rate) for rate in rates], rounds, machine, bench)
        if found is not None:
            return refused + [of_setting | row for row in _figures(rates, found)]
        refused.append(of_setting | {"rate": rates.pop(0), "note": "out of memory"})
    return refused


@dataclass(frozen=True)
class Found:
    """What was measured of one step in all rounds, and what the limit and `evs-train check` (GiB) say of it.

    `flops` are those of `cost` without what is recomputed.
    """

    seconds: list[float]
    peak: int
    estimate: float
    tokens: Tokens
    flops: float
    cost: Cost
    machine: Machine


def measure(work: Workload, steps: Sequence[Step], rounds: int, machine: Machine, bench: Bench) -> list[Found] | None:
    """Let different steps take turns; None if the memory of a GPU does not suffice."""
    places = [int(name) for name in turns([str(place) for place in range(len(steps))], 1 + rounds)]
    places += range(len(steps))  # a round that a CPU weighs
    script = [steps[place] for place in places]
    run_ = ScriptedRun(work, script, bench)
    clock = StepClock(bench.device, weighed=range(len(script) - len(steps), len(script)))
    try:
        trainer = run_.build_trainer()
        trainer.add_callback(clock)
        trainer.train()
    except torch.OutOfMemoryError:
        trainer = None
    if trainer is None:  # here the error, which holds the step's tensors, is gone
        gc.collect()
        torch.cuda.empty_cache()
        return None
    measured: dict[int, list[Measured]] = defaultdict(list)
    for place, one in zip(places, clock.steps, strict=True):
        measured[place].append(one)
    plans = run_.plan_batches(len(script))
    found = []
    for place in range(len(steps)):
        tokens = tokens_of([plans[places.index(place)]], run_.family)
        cost = cost_of(trainer.model, run_.family, tokens, machine, checkpointing=work.checkpointing)
        seconds = [one.seconds for one in measured[place][1 : 1 + rounds] if one.seconds is not None]
        peak = max(one.peak for one in measured[place] if one.peak is not None)
        flops = cost_of(trainer.model, run_.family, tokens, machine).flops
        said = expected_peak(estimate(run_, trainer.model, tokens), bench.device)
        found.append(Found(seconds, peak, said, tokens, flops, cost, machine))
    del trainer
    gc.collect()
    return found


def _figures(rates: Sequence[float], found: Sequence[Found]) -> list[Row]:
    """`found` begins with the dense step, or has none; then there is nothing to compare with."""
    dense = found[0] if rates[0] == 0 else None
    return [_figures_of(rate, one, dense) for rate, one in zip(rates, found, strict=True)]


def _figures_of(rate: float, one: Found, dense: Found | None) -> Row:
    seconds = Spread.of(one.seconds)
    num_tokens = one.tokens.of_part["language_model"]
    row: Row = {
        "rate": rate,
        "tokens": num_tokens,
        "seconds": seconds,
        "peak_gib": one.peak / GIB,
        "estimate_gib": one.estimate,
        "tokens_per_second": num_tokens / seconds.median,
        "mfu": one.flops / seconds.median / one.machine.flops,
        "least_seconds": {"vision": one.cost.vision, "language": one.cost.language, "update": one.cost.update},
        "peak_tflops": one.machine.flops / 1e12,
        "peak_gb_per_second": one.machine.bytes / 1e9,
    }
    if dense is not None:
        speedup, limit = ratio(dense.seconds, one.seconds), dense.cost.seconds / one.cost.seconds
        row |= {
            "speedup": speedup,
            "limit": limit,
            "efficiency": Spread(speedup.median / limit, speedup.lower / limit, speedup.upper / limit, speedup.count),
            "memory": one.peak / dense.peak,
        }
    return row


COLUMNS = (
    Column("model", "model"),
    Column("tuning", "tuning"),
    Column("frames", "frames"),
    Column("rate", "rate", "g"),
    Column("tokens", "tokens", ","),
    Column("seconds", "seconds", ".3f"),
    Column("speedup", "speed-up", ".2f"),
    Column("limit", "limit", ".2f"),
    Column("efficiency", "efficiency", ".2f"),
    Column("peak_gib", "peak GiB", ".2f"),
    Column("estimate_gib", "estimate", ".2f"),
    Column("memory", "of dense", ".0%"),
    Column("tokens_per_second", "tokens/s", ",.0f"),
    Column("mfu", "MFU", ".0%"),
    Column("note", "note"),
)


def draw(axes: Any, rows: Sequence[Row]) -> None:
    """Speed-up against rate, a line for each setting; hollow marks are limits."""
    lines: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if "speedup" in row:
            lines[f"{row['model']}, {row['tuning']}, {row['frames']} frames"].append(row)
    for name, of_line in lines.items():
        rates = [row["rate"] for row in of_line]
        (line,) = axes.plot(rates, [row["speedup"]["median"] for row in of_line], marker="o", label=name)
        lower = [row["speedup"]["lower"] for row in of_line]
        axes.fill_between(rates, lower, [row["speedup"]["upper"] for row in of_line], alpha=0.2, color=line.get_color())
        axes.plot(rates, [row["limit"] for row in of_line], "o", fillstyle="none", color=line.get_color())
    axes.set_xlabel("pruning rate")
    axes.set_ylabel("speed-up over dense (hollow: limit)")
    axes.legend(fontsize=6)


GROUP = Group("a training step at each pruning rate", run, COLUMNS, draw)
