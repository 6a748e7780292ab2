"""What `data.cache_features` gains, for `savings`: an epoch without it, the first with it (which writes), the second.

Each is a run of its own on H.264 files, which an index knows, so nothing is verified (`loader.py` has rows and recipe).
Seconds are the trainer's own sections from log to log, waiting for data included, without the first step. In each round
the cache begins empty, and the run without it comes first or last in turns. All three show the same rows to the same
first weights, so they must find the same losses; on a CPU to the bit. Models are trained whole, with their projector,
and with adapters on the language model, where the projector is frozen and what is kept is what it said.

An epoch with everything kept can be at most (D + V + L) / (P + L) times as fast as one without: *limit*. D is the
waiting for data, V the encoder and L the rest of the run without; P is what is left of the encoder in an epoch that
reads: a trained projector. `sections` has the median seconds of each part, and `cpu_seconds` the processor time of all
threads of the process that trains: where an epoch that reads has as little of it as the limit says and takes longer all
the same, something beside the training held it up.
"""

from __future__ import annotations

import gc
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.perf.harness import Bench, Row, Size
from benchmarks.perf.loader import NUM_CLIPS, RATE, Plan, recipe_of, write_rows
from benchmarks.perf.runs import RandomWeights
from benchmarks.perf.shapes import CPU_2B, QWEN_2B, TOY, write_checkpoint
from benchmarks.perf.sides import Found, compared, curve_of

SIDES = ("without", "first", "second")
EPOCHS = {"without": "tower in every epoch", "first": "epoch that writes", "second": "epoch that reads"}
COMPARED = (
    ("epoch that writes", "without", "first"),
    ("epoch that reads", "without", "second"),
    ("epoch that reads, after it", "first", "second"),
)
TUNINGS: tuple[Literal["full", "lora"], ...] = ("full", "lora")
Sections = Mapping[str, float]
"""Seconds of an epoch by section, and `cpu_seconds`."""
MAX_GIB = 8
PLANS: dict[Size, Plan] = {
    "toy": Plan(TOY, (64, 12), 8, (0,), 1, 2, 1),
    "cpu": Plan(CPU_2B, (160, 24), 24, (1,), 1, NUM_CLIPS - 1, 3),
    "gpu": Plan(QWEN_2B, (640, 300), 64, (8,), 1, NUM_CLIPS - 1, 3),
}


def rows_of(bench: Bench, tolerance: float) -> list[Row]:
    """For each tuning a row for the first epoch with the cache, and two for the second: against both others."""
    plan = PLANS[bench.size]
    data = write_rows(plan, bench.folder / "data"), write_checkpoint(plan.shape, bench.folder / "model")
    return [row for tuning in TUNINGS for row in _rows(tuning, data, bench, tolerance)]


def _rows(tuning: Literal["full", "lora"], data: tuple[Path, Path], bench: Bench, tolerance: float) -> list[Row]:
    """`data`: rows and checkpoint."""
    plan = PLANS[bench.size]
    bench.say(f"savings: kept features, {plan.shape.name}, {tuning}")
    found = {name: Found() for name in SIDES}
    sections: dict[str, list[Sections]] = {name: [] for name in SIDES}
    for number in range(plan.rounds):
        shutil.rmtree(bench.folder / "cache", ignore_errors=True)
        for name in SIDES if number % 2 == 0 else (*SIDES[1:], SIDES[0]):
            cache = None if name == "without" else {"path": str(bench.folder / "cache"), "max_gib": MAX_GIB}
            changes: dict[str, dict[str, Any]] = {"tuning": {"method": tuning}, "data": {"cache_features": cache}}
            recipe = recipe_of(plan, plan.workers[0], *data, bench, changes=changes)
            sections[name].append(epoch(RandomWeights(recipe, bench), found[name]))
    of_all: Row = {"model": plan.shape.name, "tuning": tuning, "frames": plan.frames, "rate": RATE}
    limit = statistics.median(map(limit_of, sections["without"], sections["second"]))
    return [
        of_all
        | {"before": EPOCHS[before], "saving": f"kept features: {saving}, {tuning}"}
        | ({"limit": limit} if (before, after) == ("without", "second") else {})
        | {"before_sections": medians(sections[before]), "sections": medians(sections[after])}
        | compared(found[before], found[after], tolerance)
        for saving, before, after in COMPARED
    ]


def limit_of(without: Sections, second: Sections) -> float:
    """How much faster than the run without the one that reads could be."""
    total = sum(seconds for name, seconds in without.items() if name.startswith("time/"))
    return total / (total - without["time/data"] - without["time/encoder"] + second["time/encoder"])


def medians(rounds: Sequence[Sections]) -> dict[str, float]:
    """Of each section, by its name."""
    return {name.removeprefix("time/"): statistics.median(one[name] for one in rounds) for name in rounds[0]}


def epoch(run: RandomWeights, found: Found) -> dict[str, float]:
    """Train on all rows once, and add what was measured; returns seconds of each section, and of the processor's."""
    run.plan(num_workers=0)  # media are probed into the index, as by evs-train check
    trainer = run.build_trainer()
    clock = _ProcessorTime()
    trainer.add_callback(clock)
    trainer.train()
    if trainer.hook.cache is not None:
        trainer.hook.cache.writer.close()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    times = {key for key in logs[0] if key.startswith("time/")}
    sections = {key: sum(log[key] for log in logs[1:]) for key in sorted(times)}
    found.seconds.append(sum(sections.values()))
    found.curve += curve_of(logs)
    del trainer
    gc.collect()
    return sections | {"cpu_seconds": clock.seconds}


class _ProcessorTime(TrainerCallback):
    """Seconds of this process's threads, from the end of the first step to the end of the last."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.ends.append(time.process_time())

    @property
    def seconds(self) -> float:
        return self.ends[-1] - self.ends[0]
