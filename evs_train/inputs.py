"""What a recipe names, read and checked before any weights are: rows, processor, rates, and what is read when.

`check.py` looks at no more than this; `uptrain.py` trains on it. Invariant: nothing here depends on the number of
workers or on time, and all processes of a run come to the same. Cost: rows are read, and where batches have a budget of
tokens, rows that were never planned are (`data/lengths.py`).
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from filelock import FileLock
from torch import nn

from evs_train import samplers
from evs_train.collate import BatchPlan, Collator
from evs_train.config import Recipe
from evs_train.data import manifest, synthetic
from evs_train.data.batches import TrainingStream
from evs_train.data.budget import Budget, BudgetBatches
from evs_train.data.index import MediaIndex, index_file
from evs_train.data.lengths import PlannedRow, Probed, Progress, Refused, plan_rows, unwatched
from evs_train.data.order import DrawOrder
from evs_train.data.probe import num_cores
from evs_train.data.rows import RowReader
from evs_train.data.schedule import FixedBatches, Schedule
from evs_train.data.video import decoding_options, frame_sampling
from evs_train.encoder_cache import check_family
from evs_train.errors import RecipeError
from evs_train.models.base import Family
from evs_train.models.loading import load_family, without_weights
from evs_train.models.tiny import build_tiny
from evs_train.models.tuning import PartSize, apply_tuning, part_sizes
from evs_train.objectives import further_rates
from evs_train.pruners import build_pruner
from evs_train.pruners.base import Pruner
from evs_train.rates import Rates
from evs_train.strict import read_json

DEEPSPEED_DIR = Path(__file__).resolve().parents[1] / "launch" / "deepspeed"
_PICTURES_PER_STEP = 4


class Inputs:
    """The inputs of a run.

    Raises (from the constructor):
        RecipeError, DataError, MediaError, ModelError: what is wrong, before any weights are loaded.
    """

    def __init__(self, recipe: Recipe, world_size: int | None = None, watched: Progress = unwatched) -> None:
        """`world_size`: number of processes to plan for; None: of those that torchrun started."""
        self.recipe = recipe
        self.watched = watched
        if recipe.deepspeed is not None:
            deepspeed_file(recipe.deepspeed)
        if recipe.demo is not None:
            _build_demo(recipe)
        self.data = manifest.read_data(recipe.data)
        self.samples = self.data.samples
        self.family: Family = load_family(recipe.model, recipe.data, recipe.evs.positions)
        if recipe.train.packing and not self.family.attention_only:
            raise RecipeError(
                f"train.packing: {self.family.model_type} cannot be packed", "its recurrent layers would mix the rows"
            )
        if recipe.data.cache_features is not None:
            check_family(self.family)
        self.sampler = samplers.build_sampler(recipe.evs.rate)
        self.rates = Rates(self.sampler, recipe.seed, recipe.evs.scope == "sample", recipe.evs.cap)
        self.pruner = build_pruner(recipe.evs.method)
        if self.pruner.selection is not None:
            raise RecipeError(
                "evs.method.alpha: what is dropped inside the language model cannot be trained with",
                "leave alpha out; evs-train eval methods=[...] takes it",
            )
        check_pruner(self.pruner, self.family, recipe.model.attn_implementation)
        if self.pruner.needs_changes and recipe.data.cache_features is not None:
            raise RecipeError(
                "data.cache_features: evs.method looks at pixels, and what is kept of a video has none",
                "leave the key out, or take a pruner that compares features",
            )
        self.world_size = world_size or int(os.environ.get("WORLD_SIZE", "1"))
        self.order = DrawOrder(len(self.samples), recipe.seed, self.data.shares)
        self.reader = RowReader(
            samples=self.samples,
            encoder=self.family,
            sampling=frame_sampling(recipe.data),
            template_kwargs=recipe.data.template_kwargs,
            max_length=recipe.data.max_length,
            last_only=recipe.data.supervise == "last",
            verify=recipe.data.verify,
            decoding=decoding_options(recipe.data),
            measure_changes=self.pruner.needs_changes,
        )
        self.collator = Collator(
            rates=self.rates,
            pad_token_id=self.family.pad_token_id,
            merge_media=self.family.merge_media,
            sequential=recipe.evs.positions == "sequential",
            packing=recipe.train.packing,
            further=further_rates(recipe.objective, self.rates),
            pruner=self.pruner,
        )

    def plan(self, num_workers: int | None = None, probed: Probed | None = None) -> list[PlannedRow | Refused]:
        """Lengths of all rows, from the cache beside the index where they are known (`data/lengths.py`).

        Of several processes that need them, one measures and the others wait for it.
        """
        index = index_file(self.recipe.data)
        with _locked(index):
            workers = num_cores() if num_workers is None else num_workers
            return plan_rows(
                self.reader,
                index,
                self.recipe.data.max_tokens_per_batch,
                num_workers=workers,
                watched=self.watched,
                probed=probed,
            )

    def schedule_of(self, rows: Sequence[PlannedRow | Refused]) -> Schedule:
        """What is read when, given the lengths of `rows`, which only a budget of tokens needs."""
        data, train = self.recipe.data, self.recipe.train
        per_step = train.grad_accumulation * self.world_size
        if data.max_tokens_per_batch is None:
            global_batch = train.batch_size * per_step
            num_steps = train.steps or math.ceil(train.epochs * len(self.samples) / global_batch)
            return FixedBatches(num_steps, per_step, train.batch_size)
        lose_frames = data.over_budget == "lose_frames"
        return BudgetBatches(
            rows,
            self.order,
            self.rates,
            Budget(data.max_tokens_per_batch, data.max_media_tokens_per_batch, train.packing, lose_frames),
            per_step=per_step,
            at_once=self.world_size,
            num_steps=train.steps,
            num_draws=math.ceil(train.epochs * len(self.samples)),
            max_attempts=data.max_bad_in_a_row,
            pruner=self.pruner,
        )

    @cached_property
    def schedule(self) -> Schedule:
        """What is read when. With a budget of tokens, rows that were never planned are planned now."""
        return self.schedule_of([] if self.recipe.data.max_tokens_per_batch is None else self.plan())

    @cached_property
    def stream(self) -> TrainingStream:
        """All micro-batches of the run."""
        schedule = self.schedule  # may write the index
        self.reader.index = MediaIndex.read(index_file(self.recipe.data))
        return TrainingStream(
            self.reader,
            self.order,
            schedule,
            picture_draws=self._picture_draws(),
            quarantine=self.recipe.data.on_error == "quarantine",
            max_bad_in_a_row=self.recipe.data.max_bad_in_a_row,
        )

    def plan_batches(self, count: int) -> list[BatchPlan]:
        """Plans of the first `count` micro-batches of the first process."""
        numbers = range(0, min(count * self.world_size, len(self.stream)), self.world_size)
        batches = [self.schedule.batch(number) for number in numbers]
        return [
            self.collator.plan([self.stream.read(slot, batch.step) for slot in batch.slots], batch.step)
            for batch in batches
        ]

    def planned_model(self) -> nn.Module:
        """The model as it would be trained, with shapes and names only (meta device)."""
        with torch.device("meta"):
            plain = without_weights(self.family.config, self.recipe.model.revision)
            return apply_tuning(plain, self.family, self.recipe.tuning)

    def part_sizes(self) -> list[PartSize]:
        """What would be trained, without reading any weights."""
        return part_sizes(self.planned_model(), self.family)

    def _picture_draws(self) -> frozenset[int]:
        """Draws of the first process whose kept patches are drawn."""
        every, per_step = self.recipe.train.pictures_every, self.schedule.per_step
        draws: set[int] = set()
        for step in range(0, self.schedule.num_steps, every) if every is not None else ():
            numbers = range(step * per_step, (step + 1) * per_step, self.world_size)
            of_step = (slot.draw for number in numbers for slot in self.schedule.batch(number).slots)
            draws.update(islice(of_step, _PICTURES_PER_STEP))
        return frozenset(draws)


def check_pruner(pruner: Pruner, family: Family, attention: str) -> None:
    """Raise RecipeError where the model cannot be told what the pruner hides."""
    if pruner.hides and not family.attention_only:
        raise RecipeError(
            f"evs.method: {family.model_type} has recurrent layers, from which no token can be hidden",
            "take another pruner",
        )
    if pruner.hides and attention == "flash_attention_2":
        raise RecipeError("evs.method: flash_attention_2 takes no mask, which this pruner needs", "use sdpa")


@contextlib.contextmanager
def _locked(index: Path) -> Iterator[None]:
    """One process at a time; several do the same work where the folder cannot be written."""
    lock = FileLock(str(index.with_suffix(".lock")))
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError:
        yield
        return
    try:
        yield
    finally:
        lock.release()


def deepspeed_file(name: str) -> Path:
    """The DeepSpeed configuration that the recipe names: a shipped one, or the path of a JSON file."""
    path = Path(name) if name.endswith(".json") else DEEPSPEED_DIR / f"{name}.json"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in DEEPSPEED_DIR.glob("*.json")))
        raise RecipeError(
            f"deepspeed: there is no configuration '{name}'", f"shipped: {shipped}; or the path of a JSON file"
        )
    try:
        read_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"deepspeed: {path} is not valid JSON: {error}") from error
    return path


def _build_demo(recipe: Recipe) -> None:
    """Write the clips and the checkpoint that a demo recipe trains on, unless they are there. One process builds."""
    demo = recipe.demo
    assert demo is not None
    data = Path(recipe.data.rows[0]).parent
    data.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(data) + ".lock"):
        synthetic.write_dataset(
            data, num_clips=demo.num_clips, seed=recipe.seed, size=demo.size, num_frames=demo.num_frames
        )
        build_tiny(demo.family, Path(recipe.model.path), seed=recipe.seed)
