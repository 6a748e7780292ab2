"""Group `savings`: what each thing gains that makes a step cheaper, against the same step without it.

| saving | without it |
|---|---|
| logits of supervised tokens | logits and loss at all tokens, as a model does that is given labels |
| passes over one encoding | `objective: sandwich` as three forward and backward passes that each encode |
| recomputation of a part | no `train.gradient_checkpointing`; nothing is frozen here, or the tower would keep nothing |
| positions by workers | m-RoPE positions and indices made when the model is called |
| kept features | a frozen tower that runs in every epoch (`epochs.py`) |
| copies that do not block | the loader's copies to the GPU as they are (`transfers.py`); it is not a key of recipes |
| compiled layers | the language model as it is; not a key of recipes either |

Sides take turns on the same model, batch and rate, and must find the same loss and the same norm of the gradient: in
float32 within `TOLERANCE`, to the bit where that is promised (positions, recomputation, kept features), and in bfloat16
on a GPU within a looser one, since kernels for other shapes round otherwise. A row whose sides differ by more has no
figures. *faster* is the step without over the step with, *memory* the peak of the step with over that without.
Packing against padding is in the group `packing`.

On a CPU the model is Qwen3-VL 2B in small: with its share of the head, and of the tower in a dense step (`shapes.py`).
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.perf import epochs, sides, transfers, without
from benchmarks.perf.harness import Bench, Column, Group, Row, Size
from benchmarks.perf.runs import Changes, Step, Workload
from benchmarks.perf.shapes import CPU_2B, QWEN_2B, TOY
from benchmarks.perf.without import Setup

RATE = 0.75
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-2}
SANDWICH: Changes = {"objective": {"kind": "sandwich"}}
RECOMPUTING: Changes = {"tuning": {"freeze": []}, "train": {"gradient_checkpointing": True}}
NOT_HERE = "not measured on this device"


@dataclass(frozen=True)
class Comparison:
    """One side without a saving, named `before` and made by `plain`, and one or more with it.

    Attributes:
        changes: keys of the recipe, on all sides.
        to_the_bit: promised in float32 on a CPU.
        gpu_only: says nothing on a CPU.
    """

    before: str
    plain: Setup
    savings: Mapping[str, Setup]
    rates: tuple[float, ...] = (RATE,)
    changes: Changes = field(default_factory=dict)
    to_the_bit: bool = False
    gpu_only: bool = False


COMPARISONS = (
    Comparison(
        "logits of all tokens", without.all_logits, {"logits of supervised tokens": without.as_it_is}, (0.0, RATE)
    ),
    Comparison(
        "passes that each encode",
        without.separate_passes,
        {"passes over one encoding": without.as_it_is},
        changes=SANDWICH,
    ),
    Comparison(
        "nothing recomputed",
        without.recompute(),
        {
            "language model recomputed": without.recompute("language_model"),
            "vision tower recomputed": without.recompute("vision"),
            "both recomputed": without.recompute("language_model", "vision"),
        },
        changes=RECOMPUTING,
        to_the_bit=True,
    ),
    Comparison(
        "positions in the forward",
        without.positions_in_forward,
        {"positions by workers": without.as_it_is},
        to_the_bit=True,
    ),
    Comparison(
        "layers not compiled",
        without.not_compiled,
        {
            "layers compiled for all lengths": without.compiled(dynamic=True),
            "layers compiled for buckets": without.compiled(dynamic=False),
        },
        gpu_only=True,
    ),
)


@dataclass(frozen=True)
class Plan:
    """What a size measures."""

    work: Workload
    frames: int
    rounds: int


PLANS: dict[Size, Plan] = {
    "toy": Plan(Workload(TOY, "full"), 8, 1),
    "cpu": Plan(Workload(CPU_2B, "full"), 24, 5),
    "gpu": Plan(Workload(QWEN_2B, "full"), 64, 10),
}


def run(bench: Bench) -> list[Row]:
    """A row for each saving."""
    plan = PLANS[bench.size]
    rows = [row for one in COMPARISONS for rate in one.rates for row in _rows(one, rate, plan, bench)]
    return rows + _transfers(plan, bench) + epochs.rows_of(bench, _tolerance(bench, to_the_bit=True))


def _rows(one: Comparison, rate: float, plan: Plan, bench: Bench) -> list[Row]:
    rows: list[Row] = [_named(saving, one.before, rate, plan) for saving in one.savings]
    if one.gpu_only and bench.device.type == "cpu":
        return [row | {"note": NOT_HERE} for row in rows]
    bench.say(f"savings: {', '.join(one.savings)}, rate {rate:g}")
    ways = {one.before: one.plain, **one.savings}
    found = sides.measure(plan.work, Step((plan.frames,), rate), ways, plan.rounds, bench, one.changes)
    gc.collect()
    torch.cuda.empty_cache()
    if found is None:
        return [row | {"note": "out of memory"} for row in rows]
    tolerance = _tolerance(bench, to_the_bit=one.to_the_bit)
    return [row | sides.compared(found[one.before], found[row["saving"]], tolerance) for row in rows]


def _transfers(plan: Plan, bench: Bench) -> list[Row]:
    row = _named(transfers.NOT_BLOCKING, transfers.BLOCKING, RATE, plan)
    if bench.device.type == "cpu" and bench.size != "toy":
        return [row | {"note": NOT_HERE}]
    found = transfers.measure(plan.work, Step((plan.frames,), RATE), plan.rounds, bench)
    tolerance = _tolerance(bench, to_the_bit=True)
    return [row | sides.compared(found[transfers.BLOCKING], found[transfers.NOT_BLOCKING], tolerance)]


def _named(saving: str, before: str, rate: float, plan: Plan) -> Row:
    return {"model": plan.work.shape.name, "frames": plan.frames, "rate": rate, "before": before, "saving": saving}


def _tolerance(bench: Bench, *, to_the_bit: bool) -> float:
    on_cpu = bench.device.type == "cpu"
    return 0.0 if to_the_bit and on_cpu else TOLERANCE[bench.device.type]


COLUMNS = (
    Column("saving", "saving"),
    Column("before", "against"),
    Column("frames", "frames"),
    Column("rate", "rate", "g"),
    Column("before_seconds", "without, s", ".3f"),
    Column("seconds", "with, s", ".3f"),
    Column("faster", "faster", ".2f"),
    Column("limit", "limit", ".2f"),
    Column("before_gib", "without, GiB", ".2f"),
    Column("peak_gib", "with, GiB", ".2f"),
    Column("memory", "memory", ".0%"),
    Column("differ", "differ", ".0e"),
    Column("note", "note"),
)


def draw(axes: Any, rows: Sequence[Row]) -> None:
    """How much faster each makes the step (bars), and the share of the memory that is left (diamonds)."""
    rows = [row for row in rows if "faster" in row][::-1]
    names = [f"{row['saving']} ({row['rate']:g})" for row in rows]
    faster = [row["faster"] for row in rows]
    errors = [[one["median"] - one["lower"] for one in faster], [one["upper"] - one["median"] for one in faster]]
    axes.barh(names, [one["median"] for one in faster], xerr=errors)
    weighed = [(name, row["memory"]) for name, row in zip(names, rows, strict=True) if "memory" in row]
    axes.plot([share for _, share in weighed], [name for name, _ in weighed], "D", color="black", markersize=4)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.tick_params(axis="y", labelsize=6)
    axes.set_xlabel("times as fast (diamonds: share of the memory)")


GROUP = Group("each saving against the step without it", run, COLUMNS, draw)
