"""One uptraining run, from a recipe to a trained model on disk: wires data, model, hook and trainer.

Everything that can be refused without weights is checked before weights are loaded. The run's folder holds
`record.json` (recipe, data fingerprint, rate distribution, versions), `metrics.jsonl`, `quarantine.jsonl`, `pictures/`,
checkpoints and `final/`. `export.py` makes a servable checkpoint of it.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, ProgressCallback, TrainingArguments, set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

from evs_train import samplers
from evs_train.arguments import training_arguments
from evs_train.callbacks import (
    JsonlCallback,
    PictureCallback,
    ProgressLine,
    RecomputeOnly,
    TrackingCallback,
)
from evs_train.checkpoint import RECORD_FILE, checkpoint_to_resume, resumptions, set_aside, write_record
from evs_train.commit import Checkpoints, Ranks
from evs_train.config import Recipe
from evs_train.data import manifest
from evs_train.data.lengths import Progress, unwatched
from evs_train.data.quarantine import QUARANTINE_FILE, Quarantine
from evs_train.encoder_cache import EncoderCache, open_store
from evs_train.errors import RecipeError
from evs_train.evaluate.live import LiveCurve, questions_of
from evs_train.finite import NOT_FINITE_FILE, FiniteGuard
from evs_train.inputs import Inputs, deepspeed_file
from evs_train.memory import checkpoint_bytes
from evs_train.models.base_files import base_folder, commit_of, fingerprints
from evs_train.models.loading import load_weights
from evs_train.models.tuning import PartSize, apply_tuning, encoder_trains, part_sizes
from evs_train.processes import agree_on, connect_deepspeed, connect_on_cpu, share_folder, wait_at_most
from evs_train.prune import EvsHook
from evs_train.tracking import Tracker
from evs_train.trainer import UptrainTrainer

_RECORDED_PACKAGES = ("evs-train", "torch", "transformers", "peft", "accelerate", "deepspeed", "decord2")


@dataclass(frozen=True)
class Summary:
    """What a run did, in numbers for its closing table. Tokens and seconds are those of this run, over all ranks.

    `quarantined`: bad samples of the whole run, by reason.
    """

    steps: int
    first_loss: float
    last_loss: float
    mean_rate: float
    video_tokens_before: int
    video_tokens_after: int
    tokens_per_second: float
    seconds: float
    quarantined: dict[str, int] = field(default_factory=dict)


class Run(Inputs):
    """A run whose inputs are read and checked; `train` loads the weights and trains."""

    def __init__(self, recipe: Recipe, world_size: int | None = None, watched: Progress = unwatched) -> None:
        super().__init__(recipe, world_size, watched)
        self.questions = questions_of(recipe)
        self.tracker = Tracker(recipe.tracking, recipe.recipe, Path(recipe.output_dir))

    def load_model(self) -> nn.Module:
        """The model as it will be trained: weights loaded, parts frozen, adapters added."""
        recipe = self.recipe
        # Full bfloat16 training needs float32 weights to step on: DeepSpeed keeps its own, otherwise the model does.
        keeps_float32 = recipe.model.dtype == "float32" or (recipe.tuning.method == "full" and recipe.deepspeed is None)
        set_seed(recipe.seed)  # adapters start equal on every rank
        plain = self.read_weights(torch.float32 if keeps_float32 else torch.bfloat16)
        return apply_tuning(plain, self.family, recipe.tuning)

    def read_weights(self, dtype: torch.dtype) -> PreTrainedModel:
        """The plain model in `dtype`."""
        return load_weights(self.recipe.model, self.family.config, dtype)

    def train(self, report_parts: Callable[[list[PartSize]], None] = lambda parts: None) -> Summary:
        """Train and save to `output_dir/final`; every process must call it."""
        output, resume = Path(self.recipe.output_dir), self.recipe.train.resume
        args = self._connected()
        record = self._record()
        checkpoint = checkpoint_to_resume(self.checkpoints, record, auto=resume == "auto") if resume else None
        if args.world_size > 1:
            rows = f"{len(self.samples)} rows (fingerprint {record['data_fingerprint'][:16]})"
            # Behind this the first process may change what the others have read.
            agree_on(f"{rows}, {self.schedule.num_steps} steps of {self.schedule.describe()}")
        trainer = self.build_trainer(args)
        self._require_space(trainer, checkpoint)
        if trainer.pop_callback(ProgressCallback):
            trainer.add_callback(ProgressLine)
        if trainer.is_world_process_zero():
            report_parts(part_sizes(trainer.model, self.family))
            self.checkpoints.clean()
            if checkpoint is None:
                set_aside(output)
            else:
                record["resumed"] = resumptions(output, record, checkpoint)
            write_record(output, record)
        first = trainer.is_world_process_zero()
        tracked = self.tracker.running(output / RECORD_FILE, resumed=checkpoint is not None) if first else nullcontext()
        with tracked:
            trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.hook.cache is not None:
            trainer.hook.cache.writer.close()
        step = trainer.state.global_step
        self.checkpoints.save("final", step, lambda staging: trainer.save_model(str(staging / "final")))
        unset_hf_deepspeed_config()  # or the model that the export loads would be partitioned, too
        return _summary(trainer)

    def _connected(self) -> TrainingArguments:
        """Connect the processes; all must see `output_dir`. Gives transformers' arguments, which know them."""
        recipe, minutes = self.recipe, self.recipe.train.timeout_minutes
        if not torch.cuda.is_available():
            connect_on_cpu(minutes)
        args = training_arguments(recipe, self.schedule.num_steps)
        if args.n_gpu > 1:
            raise RecipeError(
                f"one process sees {args.n_gpu} GPUs", "start it with torchrun --nproc_per_node N, one process per GPU"
            )
        # ZeRO-3 partitions weights as they are read, over a process group that DeepSpeed must know of by then.
        if args.device and recipe.deepspeed is not None:  # reading `device` starts the process group
            connect_deepspeed(minutes)
        wait_at_most(minutes)
        share_folder(Path(recipe.output_dir))
        return args

    @cached_property
    def checkpoints(self) -> Checkpoints:
        """Those in `output_dir`, of the processes that the training arguments made known."""
        state = PartialState()
        return Checkpoints(Path(self.recipe.output_dir), Ranks(state.process_index, state.num_processes, gather_object))

    def _require_space(self, trainer: UptrainTrainer, checkpoint: str | None) -> None:
        """Refuse to train when the disk cannot hold the checkpoints that are there at once, or the final weights."""
        train, num_steps = self.recipe.train, self.schedule.num_steps
        weights, whole = checkpoint_bytes(trainer.model, deepspeed=self.recipe.deepspeed is not None)
        done = 0 if checkpoint is None else int(checkpoint.rsplit("-", 1)[1])
        saves = 0 if train.save_every is None else math.ceil(num_steps / train.save_every) - done // train.save_every
        # One more than is kept is there before the oldest goes. A run that goes on has the others already.
        count = min(saves, train.keep_checkpoints + 1 if checkpoint is None else 1)
        self.checkpoints.require_space(
            max(count * whole, weights), f"what this run saves ({count} checkpoints at once)"
        )

    def build_trainer(self, args: TrainingArguments | None = None) -> UptrainTrainer:
        """The model with its hook in the trainer that will train it."""
        recipe, output = self.recipe, Path(self.recipe.output_dir)
        args = training_arguments(recipe, self.schedule.num_steps) if args is None else args
        model = self.load_model()
        plain: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
        hook = EvsHook(
            family=self.family,
            model=plain,
            pruner=self.pruner,
            engine_score=recipe.evs.score == "engine",
            float32_score=recipe.evs.score_dtype == "float32",
            encoder_trains=encoder_trains(model, self.family),
            equal_calls=is_deepspeed_zero3_enabled(),
            teacher=recipe.objective.kind == "teacher",
        )
        if recipe.data.cache_features is not None:
            self.reader.features = open_store(recipe, self.family, plain)
            hook.cache = EncoderCache(
                self.reader.features,
                self.family,
                plain,
                projector_trains=hook.encoder_trains,
                equal_calls=hook.equal_calls,
            )
        trainer = UptrainTrainer(
            hook=hook,
            optim=recipe.optim,
            objective=recipe.objective,
            quarantine=Quarantine(output / QUARANTINE_FILE, recipe.data, self.schedule.draws_before),
            checkpoints=self.checkpoints,
            keep_checkpoints=recipe.train.keep_checkpoints,
            finite=FiniteGuard(output / NOT_FINITE_FILE, recipe.train.max_skipped_steps),
            args=args,
            model=model,
            data_collator=self.collator,
            train_dataset=self.stream,
            callbacks=[
                JsonlCallback(output / "metrics.jsonl"),
                PictureCallback(hook, output / "pictures", self.tracker),
                TrackingCallback(self.tracker),
            ],
        )
        if isinstance(recipe.train.gradient_checkpointing, list):
            trainer.add_callback(RecomputeOnly(self.family, recipe.train.gradient_checkpointing))
        if self.questions:
            trainer.add_callback(
                LiveCurve(
                    recipe, self.family, self.questions, trainer.log, autocast=hook.autocast, tracker=self.tracker
                )
            )
        return trainer

    def _record(self) -> dict[str, Any]:
        """What the run is. A resumed one compares with it: a new fact needs its place in `resume.py`."""
        recipe = self.recipe
        folder = base_folder(recipe.model)
        deepspeed = None
        if recipe.deepspeed is not None:
            deepspeed = json.loads(deepspeed_file(recipe.deepspeed).read_text(encoding="utf-8"))
        lora = recipe.tuning.lora if recipe.tuning.method == "lora" else None
        return {
            "recipe": recipe.model_dump(),
            "seed": recipe.seed,
            "num_steps": self.schedule.num_steps,
            "step": self.schedule.describe(),
            "num_samples": len(self.samples),
            "data_fingerprint": manifest.fingerprint(self.samples, self.data.shares),
            "data_sources": self.data.describe(),
            "base_model": recipe.model.path,
            "base_commit": commit_of(recipe.model, folder),
            "base_files": fingerprints(folder),
            "lora_targets": None if lora is None else list(lora.targets or self.family.lora_targets),
            "cached_features": recipe.data.cache_features is not None,
            "deepspeed_config": deepspeed,
            "zero_stage": None if deepspeed is None else deepspeed.get("zero_optimization", {}).get("stage", 0),
            "zero_shards": None if deepspeed is None else self.world_size,
            "processes": self.world_size,
            "evs": recipe.evs.model_dump(),
            "objective": recipe.objective.model_dump(),
            "pruning_rates": samplers.describe(self.sampler),
            "python": platform.python_version(),
            "versions": {name: importlib.metadata.version(name) for name in _RECORDED_PACKAGES},
        }


def _summary(trainer: UptrainTrainer) -> Summary:
    total = trainer.tally.total
    # Without a step left to do there are only the losses that the checkpoint remembers.
    losses = trainer.losses or [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return Summary(
        steps=trainer.state.global_step,
        first_loss=losses[0],
        last_loss=losses[-1],
        mean_rate=total["rate"] / max(total["rows"], 1),
        video_tokens_before=int(total["video_tokens_before"]),
        video_tokens_after=int(total["video_tokens_after"]),
        tokens_per_second=total["tokens"] / max(trainer.seconds, 1e-9),
        seconds=trainer.seconds,
        quarantined=dict(trainer.quarantine.reasons.most_common()),
    )


def leave_process_group(*, together: bool = False) -> None:
    """End the processes' connection, so that none waits while the first one exports.

    `together`: all leave now. Otherwise torchrun would end the others as soon as one is gone.
    """
    if torch.distributed.is_initialized():
        if together:
            torch.distributed.barrier()
        torch.distributed.destroy_process_group()
