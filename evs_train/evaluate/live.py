"""The curve of the model that is being trained, every so many steps: accuracy at several rates on a few questions.

It asks as `evs-train eval` does, and draws on no random numbers, so the run trains as it would without it. Processes
share the videos; under ZeRO-3 each asks all of them, because every process must take part in every forward.
Cost: that of the answers, while training stands still; the first curve is drawn before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from evs_train.config import Recipe
from evs_train.data.video import decoding_options, frame_sampling
from evs_train.evaluate.data import Question
from evs_train.evaluate.layouts import read_questions
from evs_train.evaluate.local import LocalModel
from evs_train.evaluate.options import EvalOptions
from evs_train.evaluate.run import share
from evs_train.generation import PrunedModel
from evs_train.models.base import Family
from evs_train.pruners import build_pruner
from evs_train.tracking import Tracker

Curve = dict[float, float]
"""Accuracy by rate."""


def questions_of(recipe: Recipe) -> list[Question]:
    """What a recipe's `eval` section asks; nothing without `eval.every`.

    Raises:
        DataError, MediaError, RecipeError: questions cannot be read or asked.
    """
    return [] if recipe.eval.every is None else read_questions(_options(recipe))[0]


class LiveCurve(TrainerCallback):
    """Asks `questions` before training, every `eval.every` steps, and after the last one.

    Args:
        log: takes metrics, such as `Trainer.log`.
        autocast: the context of the trainer's forwards.
        tracker: gets a chart of all curves so far.
    """

    def __init__(
        self,
        recipe: Recipe,
        family: Family,
        questions: Sequence[Question],
        log: Callable[[dict[str, float]], None],
        *,
        autocast: Callable[[], AbstractContextManager[Any]],
        tracker: Tracker,
    ) -> None:
        self.recipe, self.family, self.questions = recipe, family, questions
        self.log, self.autocast, self.tracker = log, autocast, tracker
        self.curves: dict[int, Curve] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self._draw(model, args, state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        assert self.recipe.eval.every is not None
        if state.global_step % self.recipe.eval.every == 0 or state.global_step >= state.max_steps:
            self._draw(model, args, state, control)

    def _draw(self, model: Any, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        plain: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
        was_training = [module for module in plain.modules() if module.training]
        plain.eval()
        with self.autocast():
            curve = self._accuracies(plain)
        for module in was_training:
            module.training = True
        self.curves[state.global_step] = curve
        should_log = control.should_log
        self.log({f"eval/accuracy/{rate:g}": accuracy for rate, accuracy in curve.items()})
        control.should_log = should_log  # what was logged here is not the step's own line
        if state.is_world_process_zero:
            self.tracker.curves("eval/curve", self.curves, state.global_step)

    def _accuracies(self, plain: PreTrainedModel) -> Curve:
        recipe = self.recipe
        model = PrunedModel(
            self.family,
            plain,
            sampling=frame_sampling(recipe.data),
            template_kwargs=recipe.data.template_kwargs,
            engine_score=recipe.evs.score == "engine",
            float32_score=recipe.evs.score_dtype == "float32",
            decoding=decoding_options(recipe.data),
            pruner=build_pruner(recipe.evs.method),
        )
        asking = LocalModel(0, model, _options(recipe))
        everyone_asks_all = is_deepspeed_zero3_enabled()
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        rank = torch.distributed.get_rank() if world > 1 else 0
        mine = self.questions if everyone_asks_all else share(self.questions, rank, world)
        verdicts = [(one.rate, one.correct) for question in mine for one in asking.answer(question, recipe.eval.rates)]
        if world > 1 and not everyone_asks_all:
            verdicts = gather_object(verdicts)
        right = {rate: [correct for of, correct in verdicts if of == rate] for rate in recipe.eval.rates}
        return {rate: sum(verdicts) / len(verdicts) for rate, verdicts in right.items()}


def _options(recipe: Recipe) -> EvalOptions:
    section = recipe.eval
    return EvalOptions(
        model=[recipe.model.path],
        data=section.data,
        layout=section.layout,
        rates=section.rates,
        limit=section.limit,
        choices=section.choices,
        match=section.match,
        max_new_tokens=section.max_new_tokens,
        media_root=recipe.data.media_root if section.layout == "rows" else None,
        frames_fps=recipe.data.frames_fps,
        verify=recipe.data.verify,
        timed=0,
    )
