"""Copies to the GPU that do not block (accelerate's `non_blocking`), for `savings`: steps with and without, in turns.

What such a copy gains is that the host goes on meanwhile, and over the end of a step. So the sides are stretches of
several steps, timed from one idle device to the next, with the loader in them and nothing that waits between: losses
are logged at the end of each stretch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.perf.harness import Bench, synchronize, turns
from benchmarks.perf.runs import ScriptedRun, Step, Workload
from benchmarks.perf.sides import STILL, Found, curve_of

STEPS = {"toy": 2, "cpu": 4, "gpu": 8}
"""Of each stretch."""
BLOCKING, NOT_BLOCKING = "copies that block", "copies that do not block"


def measure(work: Workload, step: Step, rounds: int, bench: Bench) -> dict[str, Found]:
    """Seconds of a step in each stretch, the first of each side left out."""
    each = STEPS[bench.size]
    names = turns([BLOCKING, NOT_BLOCKING], 1 + rounds)
    workers = 2 if bench.device.type == "cuda" else 0
    changes: dict[str, dict[str, Any]] = {"train": {"log_every": each}, "data": {"num_workers": workers}}
    run = ScriptedRun(work, [step] * (each * len(names)), bench, STILL, changes)
    trainer = run.build_trainer()
    clock = _Stretches(names, each, bench)
    trainer.add_callback(clock)
    trainer.train()
    found = {name: Found() for name in (BLOCKING, NOT_BLOCKING)}
    points = curve_of(trainer.state.log_history)[1:]  # the first step is logged by itself
    for number, (name, point) in enumerate(zip(names, points, strict=True)):
        found[name].curve.append(point)
        if number >= len(found):
            found[name].seconds.append(clock.seconds[number] / each)
    return found


class _Stretches(TrainerCallback):
    """Sets the loader at the beginning of each stretch, and times it."""

    def __init__(self, names: Sequence[str], each: int, bench: Bench) -> None:
        self.names, self.each, self.device = names, each, bench.device
        self.seconds: list[float] = []
        self._begun = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begin(0, kwargs["train_dataloader"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.each == 0:
            synchronize(self.device)
            self.seconds.append(time.perf_counter() - self._begun)
            if state.global_step < state.max_steps:
                self._begin(state.global_step // self.each, kwargs["train_dataloader"])

    def _begin(self, number: int, loader: Any) -> None:
        loader._non_blocking = self.names[number] == NOT_BLOCKING  # what accelerate's configuration sets
        self._begun = time.perf_counter()
