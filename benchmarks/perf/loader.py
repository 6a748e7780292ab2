"""Group `loader`: whether the loader keeps up: how long a step waits for its batch, with no and with several workers.

Runs as they are, on H.264 files: rows are read, decoded, processed and collated as in training, with an index as `evs-
train check` leaves it, by a model with random weights. What is reported is the trainer's own `time/data`, as a share of
the whole between two logs; what is logged first, which has the start of the workers in it, does not count. Runs of
different numbers of workers take turns.

On a CPU workers and model share the cores, so a step gets slower by what the workers take; there only the wait says
something of the loader. Files are read from the same disk again and again, so they come from memory.
"""

from __future__ import annotations

import gc
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.perf.harness import Bench, Column, Group, Row, Size, Spread, turns
from benchmarks.perf.runs import ANSWER, QUESTION, Changes, RandomWeights, benchmark_recipe
from benchmarks.perf.shapes import CPU, QWEN_2B, TOY, Shape, write_checkpoint
from evs_train.config import Recipe
from evs_train.data.synthetic import write_dataset

RATE = 0.75
FPS = 30.0
NUM_CLIPS = 8
AIM = 0.02


@dataclass(frozen=True)
class Plan:
    """What a size measures.

    Attributes:
        clip: side in pixels and frames of each clip.
        frames: sampled of each.
        workers: numbers of workers that are compared.
        between: steps between two logs; `logs` of them are counted in each run.
        rounds: runs of each number of workers.
    """

    shape: Shape
    clip: tuple[int, int]
    frames: int
    workers: tuple[int, ...]
    between: int
    logs: int
    rounds: int


PLANS: dict[Size, Plan] = {
    "toy": Plan(TOY, (64, 12), 8, (0, 1), 2, 1, 1),
    "cpu": Plan(CPU, (448, 90), 16, (0, 1, 2), 3, 3, 2),
    "gpu": Plan(QWEN_2B, (640, 300), 64, (0, 1, 2, 4, 8), 8, 4, 2),
}


def run(bench: Bench) -> list[Row]:
    """A row for each number of workers."""
    plan = PLANS[bench.size]
    bench.say(f"loader: {plan.shape.name}, {plan.workers} workers")
    rows = write_rows(plan, bench.folder / "data")
    checkpoint = write_checkpoint(plan.shape, bench.folder / "model")
    found: dict[int, list[Window]] = defaultdict(list)
    for number in turns([str(one) for one in plan.workers], plan.rounds):
        recipe = recipe_of(plan, int(number), rows, checkpoint, bench)
        found[int(number)] += windows(RandomWeights(recipe, bench), plan)
        gc.collect()
    return [
        {
            "model": plan.shape.name,
            "workers": workers,
            "clip": f"{plan.clip[0]} px, {plan.frames} of {plan.clip[1]} frames",
            "seconds": Spread.of([one.seconds / plan.between for one in of_number]),
            "wait_ms": Spread.of([1000 * one.waited / plan.between for one in of_number]),
            "share": Spread.of([one.waited / one.seconds for one in of_number]),
        }
        for workers, of_number in found.items()
    ]


@dataclass(frozen=True)
class Window:
    """What the trainer logged of the steps between two logs."""

    seconds: float
    waited: float


def windows(run_: RandomWeights, plan: Plan) -> list[Window]:
    """Train, and read the logs but the first two: the first step is logged by itself."""
    run_.plan(num_workers=0)  # media are probed into the index, as by evs-train check
    trainer = run_.build_trainer()
    trainer.train()
    logs = [log for log in trainer.state.log_history if "time/data" in log]
    times = [{name: value for name, value in log.items() if name.startswith("time/")} for log in logs[2:]]
    assert len(times) == plan.logs
    return [Window(sum(one.values()), one["time/data"]) for one in times]


def write_rows(plan: Plan, folder: Path) -> Path:
    """Clips, and a file of rows about each of them."""
    size, frames = plan.clip
    write_dataset(folder, num_clips=NUM_CLIPS, size=size, num_frames=frames, fps=FPS)
    talk = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
    clips = sorted((folder / "clips").iterdir())
    rows = [{"id": clip.stem, "video": f"clips/{clip.name}", "conversations": talk} for clip in clips]
    path = folder / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def recipe_of(
    plan: Plan, workers: int, rows: Path, checkpoint: Path, bench: Bench, *, changes: Changes | None = None
) -> Recipe:
    """A run of one row a step; frames are resized to the side of the shape."""
    pixels = plan.frames * plan.shape.side**2
    sections: dict[str, dict[str, Any]] = {
        "model": {"path": str(checkpoint), "dtype": "float32" if bench.device.type == "cpu" else "bfloat16"},
        "data": {
            "rows": [str(rows)],
            "fps": None,
            "num_frames": plan.frames,
            "num_workers": workers,
            "video_kwargs": {"size": {"shortest_edge": pixels // plan.frames, "longest_edge": pixels}},
        },
        "evs": {"rate": RATE},
        "tuning": {"method": "lora"},
        "train": {
            "steps": plan.between * (plan.logs + 1),
            "batch_size": 1,
            "log_every": plan.between,
            "gradient_checkpointing": False,
        },
    }
    return benchmark_recipe(bench.folder / f"run {workers}", sections, changes or {})


COLUMNS = (
    Column("model", "model"),
    Column("clip", "clip"),
    Column("workers", "workers"),
    Column("seconds", "step, s", ".3f"),
    Column("wait_ms", "wait, ms", ".1f"),
    Column("share", "share", ".2%"),
)


def draw(axes: Any, rows: Sequence[Row]) -> None:
    """Share of the step that is waiting, by workers."""
    shares = [row["share"] for row in rows]
    errors = [[one["median"] - one["lower"] for one in shares], [one["upper"] - one["median"] for one in shares]]
    heights = [100 * one["median"] for one in shares]
    axes.bar([str(row["workers"]) for row in rows], heights, yerr=[[100 * e for e in side] for side in errors])
    axes.axhline(100 * AIM, color="grey", linestyle=":")
    axes.set_xlabel("workers of the loader")
    axes.set_ylabel("% of the step spent waiting")


GROUP = Group("waiting for data", run, COLUMNS, draw)
