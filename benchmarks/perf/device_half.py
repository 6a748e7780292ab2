"""The device half of pruning on its own, beside the real steps that it is a part of: for `pruning` and `alternatives`.

A *way* is a hook class: ours, or another way to prune the same batch. Ways, or rates, take turns within one scripted
run (`runs.py`). After each step its device half runs once more by itself, on features that were encoded before the run:
selection, compaction and, where the encoder trains, the gradient of what was kept. So both are timed in the same round.
In a last round, which is not timed, the host's waits are counted (`waits.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.perf.harness import Bench, Side, timed, turns
from benchmarks.perf.runs import ScriptedRun, Step, StepClock, Workload
from benchmarks.perf.waits import noted_waits
from evs_train.collate import BatchPlan
from evs_train.models.base import Encoding
from evs_train.prune import EvsHook, to_device
from evs_train.timing import Stopwatch


@dataclass(frozen=True)
class Way:
    """One way to prune one step."""

    step: Step
    hook: type[EvsHook] = EvsHook


@dataclass
class Found:
    """What was measured of one way.

    Attributes:
        seconds: of each round's step.
        half_seconds: of its device half alone, in the same rounds.
        launched: kernels of the device half; on a CPU operations.
        waits, step_waits: places where the host waits in the device half, and in the whole step.
        computed, seen: tokens that the language model computes, and those of them that attention may see.
    """

    plan: BatchPlan
    seconds: list[float] = field(default_factory=list)
    half_seconds: list[float] = field(default_factory=list)
    launched: int = 0
    waits: list[str] = field(default_factory=list)
    step_waits: list[str] = field(default_factory=list)
    computed: int = 0
    seen: int = 0


class DeviceHalf:
    """Selection, compaction and their gradient on one batch, with its features at hand."""

    def __init__(self, hook: EvsHook, batch: dict[str, Any], device: torch.device) -> None:
        self.device = device
        self.hook = dataclasses.replace(hook, stopwatch=Stopwatch(), passes=[], kept=[])
        self.batch = to_device(batch, device)
        with torch.no_grad():
            encoded, blanks = self.hook._encode(self.batch["media"], training=False)
        for features in [one for of_kind in encoded.values() for one in of_kind]:
            features[:] = [layer.detach().requires_grad_(hook.encoder_trains) for layer in features]
        self.encoding: Encoding = (encoded, blanks)
        self._leaves = list(with_gradient(encoded))
        self._ones = [torch.ones_like(one) for one in with_gradient(self.prune())]

    def prune(self) -> dict[str, Any]:
        """What the model is called with."""
        return self.hook._pruned(self.batch, self.encoding, {})

    def __call__(self) -> None:
        inputs = self.prune()
        if self._leaves:
            torch.autograd.grad(list(with_gradient(inputs)), self._leaves, self._ones)

    @property
    def side(self) -> Side:
        """For timing."""
        return timed(self, self.device)


def measure(work: Workload, ways: Sequence[Way], rounds: int, bench: Bench) -> list[Found]:
    """Let the ways take turns in real steps, each beside its device half; `rounds` of them after one to warm up."""
    places = [int(name) for name in turns([str(place) for place in range(len(ways))], 2 + rounds)]
    run = ScriptedRun(work, [ways[place].step for place in places], bench)
    trainer = run.build_trainer()
    halves, found = [], []
    for place, way in enumerate(ways):
        trainer.hook.__class__ = way.hook
        batch = run.collator([run.stream[places.index(place)]])
        halves.append(DeviceHalf(trainer.hook, batch, bench.device))
        found.append(Found(batch["plan"]))
    clock = StepClock(bench.device)
    watch = _Watch(trainer.hook, [ways[place].hook for place in places], len(places) - len(ways), bench.device)
    beside = _Beside([halves[place] for place in places])
    for callback in (watch, clock, beside):
        trainer.add_callback(callback)
    trainer.train()
    timed_places = list(enumerate(places))[len(ways) : -len(ways)]
    for number, place in timed_places:
        seconds = clock.steps[number].seconds
        assert seconds is not None  # no step is weighed
        found[place].seconds.append(seconds)
        found[place].half_seconds.append(beside.seconds[number])
    for place, step_waits in zip(places[-len(ways) :], watch.found, strict=True):
        found[place].step_waits = step_waits
    for half, one in zip(halves, found, strict=True):
        _look_at(half, one)
    del trainer, clock, watch, beside, halves
    gc.collect()
    return found


def _look_at(half: DeviceHalf, found: Found) -> None:
    with noted_waits(half.device) as waits:
        half()
    found.waits = waits.places
    found.launched = launched(half) if half.device.type == "cuda" else waits.num_operations
    inputs = half.prune()
    found.computed, found.seen = inputs["input_ids"].numel(), int(inputs["attention_mask"].sum())


def launched(half: DeviceHalf) -> int:
    """Kernels, and copies on the device, that a GPU is given for one device half."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        half()
        torch.cuda.synchronize(half.device)
    return sum(event.device_type.name == "CUDA" for event in profile.events() or ())


class _Watch(TrainerCallback):
    """Gives each step its way; from step `counted` on, counts waits."""

    def __init__(self, hook: EvsHook, hooks: Sequence[type[EvsHook]], counted: int, device: torch.device) -> None:
        self.hook, self.hooks, self.counted, self.device = hook, hooks, counted, device
        self.found: list[list[str]] = []
        self._open = contextlib.ExitStack()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.hook.__class__ = self.hooks[state.global_step]
        if state.global_step >= self.counted:
            waits = self._open.enter_context(noted_waits(self.device))
            self.found.append(waits.places)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._open.close()


class _Beside(TrainerCallback):
    """Times a device half after each step."""

    def __init__(self, halves: Sequence[DeviceHalf]) -> None:
        self.halves = halves
        self.seconds: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds.append(self.halves[state.global_step - 1].side())


def with_gradient(value: Any) -> Iterator[Tensor]:
    """All tensors in nested mappings and sequences that a gradient goes through."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from with_gradient(item)
