"""Steps of a real run on models without files: `Run` and its trainer, with random weights and random pixels.

A *script* says what each optimizer step shows: how many frames each of its rows has, and its pruning rate. So the sides
of a comparison take turns within one run, and all that happens in a step is what happens in training: the collator's
batch, the hook, forward, backward, clipping, AdamW and the schedule of its rate. Rows are made by the family's
processor from blank frames (`RowReader.blank`) whose pixels are then drawn at random: ids, labels, positions and
lengths are those of training, decoding is left to the benchmarks of data. Each clip is made once and kept.

What is not as in training: nothing is saved or logged between steps, and without workers a batch is collated while the
device waits, before the step begins (`StepClock` does not count it).
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from benchmarks.perf.harness import Bench, PeakMemory, bytes_of, synchronize
from benchmarks.perf.limit import Tokens
from benchmarks.perf.shapes import Shape, write_checkpoint
from evs_train.arguments import training_arguments
from evs_train.config import Recipe
from evs_train.data.chat import Example, Media
from evs_train.data.index import Facts
from evs_train.data.order import DrawOrder
from evs_train.data.rows import RowReader
from evs_train.data.video import Clip
from evs_train.inputs import Inputs, deepspeed_file
from evs_train.memory import MemoryEstimate, estimate_memory
from evs_train.rates import Rates
from evs_train.samplers import RateSampler
from evs_train.trainer import UptrainTrainer
from evs_train.uptrain import Run

QUESTION = "<video>\nWhat happens in this video? Describe the scene at this time, and which object moves."
ANSWER = "A red circle moves to the left. Then a blue square appears, turns, and leaves the screen at the top."
FPS = 2.0
Changes = Mapping[str, dict[str, Any]]
"""Keys of a recipe by section."""


@dataclass(frozen=True)
class Step:
    """One optimizer step: frames of each row, and the pruning rate."""

    frames: tuple[int, ...]
    rate: float


@dataclass(frozen=True)
class Workload:
    """What is trained, and how."""

    shape: Shape
    tuning: Literal["full", "lora"]
    checkpointing: bool = False


@dataclass(frozen=True)
class Plan:
    """What a size of a group measures: models, frames of clips, rounds that count."""

    works: tuple[Workload, ...]
    frames: tuple[int, ...]
    rounds: int


@dataclass(frozen=True)
class ByStep(RateSampler):
    """The rates of a script."""

    rates: tuple[float, ...]

    def _draw(self, generator: np.random.Generator, *, step: int, num_units: int | None) -> float:
        return self.rates[step]


@dataclass(frozen=True)
class Scripted(DrawOrder):
    """The rows of a script, by draw."""

    rows: tuple[int, ...] = ()

    def row(self, draw: int, attempt: int = 0) -> int:
        return self.rows[draw]


@dataclass
class RandomReader(RowReader):
    """A `RowReader` of clips that are on no disk: `facts` of each row's, whose pixels are random."""

    facts: tuple[Facts, ...] = ()
    _made: dict[int, Example] = field(default_factory=dict)

    def read(self, number: int, *, share: float = 1.0, keep_frames: bool = False) -> Example:
        if number not in self._made:
            example = self.blank(self.samples[number], [self.facts[number]])
            generator = torch.Generator().manual_seed(number)
            self._made[number] = dataclasses.replace(example, media=_random_pixels(example.media, generator))
        return self._made[number]


def clip_facts(frames: int, side: int) -> Facts:
    """What an index would know of a clip of so many frames at 2 a second."""
    times = tuple(number / FPS for number in range(frames))
    return Facts("video", side, side, "none", frames, FPS, frames / FPS, indices=tuple(range(frames)), timestamps=times)


def conversation(name: str, folder: Path) -> dict[str, Any]:
    """A row of a file in `folder`, whose clip nobody opens."""
    (folder / "clip.mp4").touch()
    talk = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
    return {"id": name, "video": "clip.mp4", "conversations": talk}


def _random_pixels(media: Media, generator: torch.Generator) -> Media:
    def drawn(value: Any) -> Any:
        return torch.randn(value.shape, generator=generator) if value.is_floating_point() else value

    return {
        name: [drawn(one) for one in value] if isinstance(value, list) else drawn(value)
        for name, value in media.items()
    }


class RandomWeights(Run):
    """A run of a checkpoint without weights, which says nothing while it trains."""

    def __init__(self, recipe: Recipe, bench: Bench) -> None:
        self.bench = bench
        super().__init__(recipe)

    def read_weights(self, dtype: torch.dtype) -> PreTrainedModel:
        """Random ones, made on the device."""
        config = self.family.config
        config.use_cache = config.get_text_config().use_cache = False  # as `load_weights` does
        attention = self.recipe.model.attn_implementation
        with self.bench.device:
            model: PreTrainedModel = AutoModelForImageTextToText.from_config(
                config, dtype=dtype, attn_implementation=attention
            )
        return model

    def build_trainer(self, args: TrainingArguments | None = None) -> UptrainTrainer:
        Path(self.recipe.output_dir).mkdir(parents=True, exist_ok=True)
        trainer = super().build_trainer(args)
        silence(trainer)
        return trainer


class ScriptedRun(RandomWeights):
    """A run of a script."""

    def __init__(self, work: Workload, script: Sequence[Step], bench: Bench, *changes: Changes) -> None:
        """`changes`: keys of the recipe that are not as in the other groups."""
        self.script = tuple(script)
        clips = sorted({frames for step in script for frames in step.frames})
        super().__init__(_recipe(work, self.script, len(clips), bench, changes), bench)
        rates = Rates(ByStep(tuple(step.rate for step in script)), cap=False)
        self.collator = dataclasses.replace(self.collator, rates=rates)
        rows = tuple(clips.index(frames) for step in script for frames in step.frames)
        self.order = Scripted(self.order.num_rows, self.order.seed, rows=rows)
        plain = {f.name: getattr(self.reader, f.name) for f in dataclasses.fields(self.reader) if f.init}
        self.facts = tuple(clip_facts(frames, work.shape.side) for frames in clips)
        self.reader = RandomReader(**plain, facts=self.facts)

    def blank_clip(self, row: int) -> Clip:
        """The clip of a row before its pixels are drawn."""
        return self.facts[row].blank_clip(str(row), self.reader.sampling)

    def training_arguments(self) -> TrainingArguments:
        """What a run of this recipe hands to its Trainer."""
        return training_arguments(self.recipe, self.schedule.num_steps)


def estimate(inputs: Inputs, model: nn.Module, tokens: Tokens, num_gpus: int = 1) -> MemoryEstimate:
    """What `evs-train check` would say of the memory that `tokens` take in one micro-batch."""
    name = inputs.recipe.deepspeed
    deepspeed = None if name is None else json.loads(deepspeed_file(name).read_text(encoding="utf-8"))
    return estimate_memory(
        model,
        inputs.family,
        inputs.recipe,
        deepspeed,
        num_tokens=tokens.of_part["language_model"],
        num_video_tokens=tokens.of_part["projector"],
        num_image_tokens=0,
        num_logits=tokens.supervised,
        num_processes=num_gpus,
    )


def expected_peak(said: MemoryEstimate, device: torch.device) -> float:
    """GiB of an estimate that `StepClock` would find. On a CPU the pixels are there before a step, and not counted."""
    return said.total - (said.inputs if device.type == "cpu" else 0.0)


def silence(trainer: Any) -> None:
    """No progress bar and no printed logs."""
    trainer.pop_callback(ProgressCallback)
    trainer.pop_callback(PrinterCallback)


def _recipe(work: Workload, script: Sequence[Step], num_clips: int, bench: Bench, changes: Sequence[Changes]) -> Recipe:
    (batch_size,) = {len(step.frames) for step in script}
    folder = bench.folder / f"{work.shape.name}, {num_clips} clips"
    checkpoint = bench.folder / work.shape.name
    if not checkpoint.is_dir():
        write_checkpoint(work.shape, checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [conversation(str(number), folder) for number in range(num_clips)]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    sections: dict[str, dict[str, Any]] = {
        "model": {"path": str(checkpoint), "dtype": "float32" if bench.device.type == "cpu" else "bfloat16"},
        "data": {"rows": [str(folder / "rows.json")], "num_frames": 1, "min_frames": 1, "num_workers": 0},
        "evs": {"rate": 0.0},  # the script has the rates
        "tuning": {"method": work.tuning},
        "train": {
            "steps": len(script),
            "batch_size": batch_size,
            "gradient_checkpointing": work.checkpointing,
            "log_every": len(script) + 1,
        },
    }
    return benchmark_recipe(folder / "run", sections, *changes)


def benchmark_recipe(output_dir: Path, *sections: Changes) -> Recipe:
    """A recipe of what `sections` say, later ones overruling; it exports nothing and speaks to no W&B."""
    merged: dict[str, dict[str, Any]] = {"tracking": {"wandb": False}, "export": {"enabled": False}}
    for name, keys in (item for one in sections for item in one.items()):
        merged[name] = merged.get(name, {}) | keys
    return Recipe.model_validate({"recipe": "benchmark", "output_dir": str(output_dir), **merged})


@dataclass(frozen=True)
class Measured:
    """One step: its seconds from an idle device to an idle device, and the peak memory of its tensors in bytes.

    On a CPU it is one or the other; the other is None.
    """

    seconds: float | None
    peak: int | None


class StepClock(TrainerCallback):
    """Measures each step of a run from where its batch is on the device to where its optimizer has stepped.

    Attributes:
        steps: what was measured, in order; fewer than there are if the run broke off.
    """

    def __init__(self, device: torch.device, weighed: Sequence[int] = ()) -> None:
        """`weighed`: steps of which a CPU measures the memory instead of the time."""
        self.device = device
        self.weighed = frozenset(weighed)
        self.steps: list[Measured] = []
        self._peak = PeakMemory(device)
        self._begun = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        synchronize(self.device)
        if self._weighs(state.global_step):
            self._peak = PeakMemory(self.device)
            self._peak.begin(bytes_of(held_by(kwargs["model"], kwargs["optimizer"])))
        self._begun = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        synchronize(self.device)
        seconds = time.perf_counter() - self._begun
        weighed = self._weighs(state.global_step - 1)
        peak = self._peak.end() if weighed else None
        self.steps.append(Measured(None if weighed and self.device.type == "cpu" else seconds, peak))

    def _weighs(self, step: int) -> bool:
        return self.device.type == "cuda" or step in self.weighed


def held_by(model: Any, optimizer: Any) -> list[torch.Tensor]:
    """Tensors that stay from step to step: parameters, buffers and the optimizer's states."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    return [*model.parameters(), *model.buffers(), *(value for value in states if isinstance(value, torch.Tensor))]
