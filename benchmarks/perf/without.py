"""Steps without one saving each, in our own few lines: the sides that `savings` compares with.

A *setup* makes the trainer of a scripted run take its next steps in one way; it undoes what another one did. Each way
computes the same loss and the same gradients as ours, up to rounding, for batches of one row with one video.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from evs_train.collate import BatchPlan
from evs_train.config import ObjectiveSection, Part
from evs_train.data.template import IGNORE_INDEX
from evs_train.models.base import Encoding
from evs_train.models.tuning import recompute_only
from evs_train.objectives import cross_entropies
from evs_train.prune import EvsHook
from evs_train.trainer import UptrainTrainer

Setup = Callable[[UptrainTrainer], None]
BUCKET = 512
"""Tokens: lengths are padded to multiples of it where each length is compiled by itself."""


def as_it_is(trainer: UptrainTrainer) -> None:
    """With every saving."""
    _let(trainer, UptrainTrainer, EvsHook)


def all_logits(trainer: UptrainTrainer) -> None:
    """Logits of all tokens, and the loss over all of them, as a model takes it that is given labels."""
    _let(trainer, LossOfAll, AllLogits)


def separate_passes(trainer: UptrainTrainer) -> None:
    """Each pass of an objective is a forward and a backward pass by itself, its own encoding in it."""
    _let(trainer, SeparatePasses, EvsHook)


def positions_in_forward(trainer: UptrainTrainer) -> None:
    """Positions and indices are made from the ids when the model is called."""
    _let(trainer, UptrainTrainer, PositionsInForward)


def recompute(*parts: Part) -> Setup:
    """Activations of these parts are computed again for the backward pass."""

    def setup(trainer: UptrainTrainer) -> None:
        as_it_is(trainer)
        recompute_only(trainer.model, trainer.hook.family, parts)

    return setup


def compiled(*, dynamic: bool) -> Setup:
    """The layers of the language model are compiled: for all lengths at once, or each length that a bucket has.

    Layers rather than the whole, since they share one compiled form and what stands between them (deepstack features)
    reads values back.
    """

    def setup(trainer: UptrainTrainer) -> None:
        _let(trainer, UptrainTrainer, EvsHook if dynamic else Bucketed)
        for layer in _layers(trainer):
            layer.compile(dynamic=dynamic)

    return setup


def not_compiled(trainer: UptrainTrainer) -> None:
    """What `compiled` did is undone."""
    as_it_is(trainer)
    for layer in _layers(trainer):
        layer._compiled_call_impl = None


def _let(trainer: UptrainTrainer, kind: type[UptrainTrainer], hook: type[EvsHook]) -> None:
    trainer.__class__, trainer.hook.__class__ = kind, hook


def _layers(trainer: UptrainTrainer) -> Collection[Any]:
    layers: Collection[Any] = trainer.hook.model.get_decoder().layers
    return layers


class AllLogits(EvsHook):
    """Leaves the output layer all hidden states; `targets` (L',) are those of all of them."""

    def _for_training(self, batch: dict[str, Any], encoding: Encoding, others: dict[str, Any]) -> dict[str, Any]:
        inputs = self._pruned(batch, encoding, others)
        self.targets = F.pad(inputs.pop("labels"), (0, 1), value=IGNORE_INDEX)[:, 1:].flatten()
        return inputs


class LossOfAll(UptrainTrainer):
    """Takes the loss over all logits (1, L', V); it is 0 where nothing is trained on."""

    def _loss_of(self, plan: BatchPlan, outputs: Any, name: str | None) -> Tensor:
        return cross_entropies(outputs["logits"][0], self.hook.targets).sum()


class SeparatePasses(UptrainTrainer):
    """Makes the passes of an objective one after the other, as micro-batches of one step."""

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        assert num_items_in_batch is not None  # every batch has labels
        objective, self.objective = self.objective, ObjectiveSection()
        alone = {name: value for name, value in inputs.items() if name != "further"}
        passes = [*inputs["further"], {}]
        total = torch.zeros((), device=self.args.device)
        for one in passes:
            total += super().training_step(model, {**alone, **one}, num_items_in_batch * len(passes))
        self.objective = objective
        return total


class PositionsInForward(EvsHook):
    """Makes positions as the model's forward would if it were given none, and indices by looking at the ids."""

    def _pruned(self, batch: dict[str, Any], encoding: Encoding, others: dict[str, Any]) -> dict[str, Any]:
        ids: Tensor = batch["input_ids"]
        of_video = ids == self.family.config.video_token_id
        positions, _ = self.model.model.get_rope_index(
            ids,
            mm_token_type_ids=torch.where(of_video, 2, 0),
            video_grid_thw=batch["media"]["video_grid_thw"],
            attention_mask=torch.ones_like(ids),
        )
        (count,) = batch["plan"].num_tokens
        index = {
            "always": (~of_video).flatten().nonzero()[:, 0],
            "video": of_video.flatten().nonzero()[:, 0],
            "target": torch.arange(count, device=ids.device),
            "boundaries": torch.tensor([0, count], dtype=torch.int32, device=ids.device),
        }
        return super()._pruned({**batch, "position_ids": positions, "index": index}, encoding, others)


class Bucketed(EvsHook):
    """Pads the pruned row to the next multiple of `BUCKET`."""

    def _pruned(self, batch: dict[str, Any], encoding: Encoding, others: dict[str, Any]) -> dict[str, Any]:
        plan: BatchPlan = batch["plan"]
        rows, length = plan.shape
        padded = dataclasses.replace(plan, shape=(rows, -(-length // BUCKET) * BUCKET))
        return super()._pruned({**batch, "plan": padded}, encoding, others)
