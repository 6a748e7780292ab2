"""What `data.cache_features` gains, for `savings`: an epoch without it, the first with it (which writes), the second.

Each is a run of its own on H.264 files, which an index knows, so nothing is verified (`loader.py` has rows and recipe).
Seconds are the trainer's own sections from log to log, waiting for data included, without the first step. In each round
the cache begins empty, and the run without it comes first or last in turns. All three show the same rows to the same
first weights, so they must find the same losses; on a CPU to the bit.

An epoch with everything kept can be at most (D + V + L) / L times as fast as one without, where D is the waiting for
data, V the encoder and L the rest: *limit*, from the sections of the run without. The projector runs in every epoch and
is counted in V, so the limit is somewhat too high.
"""

from __future__ import annotations

import gc
import shutil
import statistics
from typing import Any

from benchmarks.perf.harness import Bench, Row, Size
from benchmarks.perf.loader import NUM_CLIPS, RATE, Plan, recipe_of, write_rows
from benchmarks.perf.runs import RandomWeights
from benchmarks.perf.shapes import CPU_2B, QWEN_2B, TOY, write_checkpoint
from benchmarks.perf.sides import Found, compared, curve_of

SIDES = ("without", "first", "second")
MAX_GIB = 8
PLANS: dict[Size, Plan] = {
    "toy": Plan(TOY, (64, 12), 8, (0,), 1, 2, 1),
    "cpu": Plan(CPU_2B, (160, 24), 24, (1,), 1, NUM_CLIPS - 1, 3),
    "gpu": Plan(QWEN_2B, (640, 300), 64, (8,), 1, NUM_CLIPS - 1, 3),
}


def rows_of(bench: Bench, tolerance: float) -> list[Row]:
    """A row for the first epoch with the cache, and one for the second."""
    plan = PLANS[bench.size]
    bench.say(f"savings: kept features, {plan.shape.name}")
    rows = write_rows(plan, bench.folder / "data")
    checkpoint = write_checkpoint(plan.shape, bench.folder / "model")
    found = {name: Found() for name in SIDES}
    limits = []
    for number in range(plan.rounds):
        shutil.rmtree(bench.folder / "cache", ignore_errors=True)
        for name in SIDES if number % 2 == 0 else (*SIDES[1:], SIDES[0]):
            cache = None if name == "without" else {"path": str(bench.folder / "cache"), "max_gib": MAX_GIB}
            changes: dict[str, dict[str, Any]] = {"tuning": {"method": "full"}, "data": {"cache_features": cache}}
            recipe = recipe_of(plan, plan.workers[0], rows, checkpoint, bench, changes=changes)
            sections = epoch(RandomWeights(recipe, bench), found[name])
            if name == "without":
                total = sum(sections.values())
                limits.append(total / (total - sections["time/data"] - sections["time/encoder"]))
    of_all: Row = {"model": plan.shape.name, "frames": plan.frames, "rate": RATE, "before": "tower in every epoch"}
    first, second = (compared(found["without"], found[name], tolerance) for name in ("first", "second"))
    return [
        of_all | {"saving": "kept features: epoch that writes"} | first,
        of_all | {"saving": "kept features: epoch that reads", "limit": statistics.median(limits)} | second,
    ]


def epoch(run: RandomWeights, found: Found) -> dict[str, float]:
    """Train on all rows once, and add what was measured; returns the seconds of each section."""
    run.plan(num_workers=0)  # media are probed into the index, as by evs-train check
    trainer = run.build_trainer()
    trainer.train()
    if trainer.hook.cache is not None:
        trainer.hook.cache.writer.close()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    times = {key for key in logs[0] if key.startswith("time/")}
    sections = {key: sum(log[key] for log in logs[1:]) for key in times}
    found.seconds.append(sum(sections.values()))
    found.curve += curve_of(logs)
    del trainer
    gc.collect()
    return sections
