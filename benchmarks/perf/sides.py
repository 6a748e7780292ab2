"""Ways to take the same step that take turns in one training, for `savings`: time, peak memory, loss and gradient.

All steps of the run show the same rows at the same rate to the same weights: the learning rate is too small to move
any, so that every side must find the same loss and the same norm of the gradient in each of its steps. Everything else
is a step of training (`runs.py`). The trainer is made ready for a side before the clock starts.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.perf.harness import Bench, Row, Spread, ratio, turns
from benchmarks.perf.runs import Changes, ScriptedRun, Step, StepClock, Workload
from benchmarks.perf.without import Setup
from evs_train.memory import GIB
from evs_train.trainer import UptrainTrainer

STILL: Changes = {"optim": {"lr": 1e-20}, "train": {"log_every": 1}}
Curve = list[tuple[float, float]]
"""Loss and norm of the gradient of each step."""


@dataclass
class Found:
    """What was measured of one side: seconds of each round, bytes at the peak, loss and gradient of all its steps."""

    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    curve: Curve = field(default_factory=list)


def measure(
    work: Workload, step: Step, sides: Mapping[str, Setup], rounds: int, bench: Bench, *changes: Changes
) -> dict[str, Found] | None:
    """Let the sides take turns: a round to warm up, `rounds` that count, and one that a CPU weighs.

    None if the memory of a GPU does not suffice.
    """
    names = [*turns(list(sides), 1 + rounds), *sides]
    run = ScriptedRun(work, [step] * len(names), bench, STILL, *changes)
    clock = StepClock(bench.device, weighed=range(len(names) - len(sides), len(names)))
    trainer = run.build_trainer()
    trainer.add_callback(_MakeReady(trainer, [sides[name] for name in names]))
    trainer.add_callback(clock)
    try:
        trainer.train()
    except torch.OutOfMemoryError:
        return None
    found = {name: Found() for name in sides}
    logs = curve_of(trainer.state.log_history)
    for number, (name, one, point) in enumerate(zip(names, clock.steps, logs, strict=True)):
        found[name].curve.append(point)
        found[name].peak = max(found[name].peak, one.peak or 0)
        if len(sides) <= number < len(names) - len(sides) and one.seconds is not None:
            found[name].seconds.append(one.seconds)
    return found


def curve_of(logs: Sequence[Mapping[str, Any]]) -> Curve:
    """Of the logs of each step."""
    return [(float(log["loss"]), float(log["grad_norm"])) for log in logs if "loss" in log]


def difference(one: Curve, other: Curve) -> float:
    """The largest relative difference of losses or norms of gradients in the same place."""
    pairs = [pair for points in zip(one, other, strict=True) for pair in zip(*points, strict=True)]
    return max(abs(value / base - 1) if value != base else 0.0 for value, base in pairs)


def compared(before: Found, after: Found, tolerance: float) -> Row:
    """Figures of a saving; sides whose losses differ by more than `tolerance` have none."""
    differ = difference(before.curve, after.curve)
    if differ > tolerance:
        return {"differ": differ, "note": f"not the same step: differs by {differ:.0e}"}
    row: Row = {
        "before_seconds": Spread.of(before.seconds),
        "seconds": Spread.of(after.seconds),
        "faster": ratio(before.seconds, after.seconds),
        "differ": differ,
    }
    if before.peak:
        row |= {"before_gib": before.peak / GIB, "peak_gib": after.peak / GIB, "memory": after.peak / before.peak}
    return row


class _MakeReady(TrainerCallback):
    """Lets each step be taken in its way."""

    def __init__(self, trainer: UptrainTrainer, setups: Sequence[Setup]) -> None:
        self.trainer, self.setups = trainer, setups

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.setups[state.global_step](self.trainer)
        gc.collect()
