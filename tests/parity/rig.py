"""What the parity tests share: a family with its tiny model, real examples, and independent slow references."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evs_train.collate import BatchPlan, Collator
from evs_train.config import DataSection, ModelSection
from evs_train.data.batches import TrainingStream
from evs_train.data.chat import IGNORE_INDEX, Example
from evs_train.data.manifest import read_rows
from evs_train.data.video import FrameSampling
from evs_train.models.loading import load_family, load_weights
from evs_train.prune import EvsHook
from evs_train.samplers import build_sampler


class Rig:
    """A tiny model of one family, its rows as examples by id, and batches of them at any rate."""

    def __init__(
        self, checkpoint: Path, rows: Path, dtype: torch.dtype = torch.float32, section: ModelSection | None = None
    ) -> None:
        section = section or ModelSection(path=str(checkpoint), dtype="float32")
        self.family = load_family(section, DataSection(rows=str(rows)))
        self.model: Any = load_weights(section, self.family.config, dtype)
        samples = read_rows([rows])
        self.stream = TrainingStream(samples, self.family, FrameSampling(fps=8.0), num_draws=len(samples), seed=0)
        drawn = [self.stream.read(draw) for draw in range(len(samples))]
        self.examples: dict[str, Example] = {example.sample_id: example for example in drawn}

    def batch(self, names: Sequence[str], rate: Any = 0.0, **options: Any) -> dict[str, Any]:
        settings: dict[str, Any] = {"seed": 0, "global_batch": 8, "cap": False, **options}
        collator = Collator(
            sampler=build_sampler(rate),
            pad_token_id=self.family.pad_token_id,
            merge_media=self.family.merge_media,
            **settings,
        )
        return collator([self.examples[name] for name in names])

    def forward(self, batch: dict[str, Any], **options: Any) -> tuple[Any, EvsHook]:
        hook = EvsHook(self.family, self.model, **options)
        handle = hook.attach(self.model)
        try:
            return self.model(**batch), hook
        finally:
            handle.remove()

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: p.grad if p.grad is None else p.grad.clone() for name, p in self.model.named_parameters()}


def attention_mask(batch: dict[str, Any]) -> Tensor:
    """1 at the real tokens of an unpruned batch. Padding lies after the last token that is always kept or a video's."""
    mask = torch.zeros_like(batch["input_ids"]).flatten()
    mask[torch.cat([batch["index"]["always"], batch["index"]["video"]])] = 1
    return mask.view_as(batch["input_ids"])


def plain_media(rig: Rig, batch: dict[str, Any]) -> dict[str, Any]:
    """Encoder inputs as the plain forward takes them. InternVL's takes frames and tiles as one, in reading order."""
    if rig.family.model_type != "internvl":
        return dict(batch["media"])
    images, videos = (iter(batch["media"].get(name, ())) for name in ("pixel_values", "pixel_values_videos"))
    pixels = [next(videos if planned.item.kind == "video" else images) for planned in batch["plan"].items]
    return {"pixel_values": torch.cat(pixels)} if pixels else {}


def slow_retained(embeds: Tensor, rate: float) -> list[int]:
    """The EVS rule with plain loops, written from the formula. `embeds` (T, N, D)."""
    num_units, per_unit, _ = embeds.shape
    scores: list[tuple[float, int]] = []
    for unit in range(num_units):
        for place in range(per_unit):
            index = unit * per_unit + place
            if unit == 0:
                scores.append((255.0, index))
                continue
            cosine = nn.functional.cosine_similarity(embeds[unit, place], embeds[unit - 1, place], dim=0)
            scores.append((float(1 - cosine), index))
    keep = max(per_unit, math.trunc(num_units * per_unit * (1 - rate)))
    ranked = sorted(scores, key=lambda scored: (-scored[0], scored[1]))
    return sorted(index for _, index in ranked[:keep])


def kept_positions(rig: Rig, batch: dict[str, Any]) -> Tensor:
    """(B, L) bool: tokens of the unpruned batch that EVS keeps, found with the slow reference."""
    plan: BatchPlan = batch["plan"]
    kept = torch.zeros(batch["input_ids"].numel(), dtype=torch.bool)
    kept[batch["index"]["always"]] = True
    if plan.videos:
        with torch.no_grad():
            encoded = rig.family.encode(rig.model, batch["media"], "video")
        places = batch["index"]["video"].split([planned.item.num_tokens for planned in plan.videos])
        for planned, features, where in zip(plan.videos, encoded, places, strict=True):
            scored = rig.family.score_tensor(features)
            shaped = scored.view(planned.item.num_units, planned.item.tokens_per_unit, -1)
            kept[where[slow_retained(shaped, planned.pruning_rate)]] = True
    return kept.view_as(batch["input_ids"])


def supervised(labels: Tensor) -> list[list[int]]:
    """Supervised ids of each row, in order."""
    return [row[row != IGNORE_INDEX].tolist() for row in labels]
