"""What the parity tests share: a family with its tiny model, real examples, and independent slow references."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evs_train.collate import BatchPlan, Collator
from evs_train.config import ModelSection
from evs_train.data.batches import Examples
from evs_train.data.chat import Example
from evs_train.data.manifest import read_rows
from evs_train.data.rows import RowReader
from evs_train.data.sampling import FrameSampling
from evs_train.data.template import IGNORE_INDEX
from evs_train.data_config import DataSection
from evs_train.models.base import Encoding
from evs_train.models.loading import load_family, load_weights
from evs_train.objectives import cross_entropies
from evs_train.prune import KINDS, EvsHook, compact
from evs_train.pruners.base import Choice, Pruner
from evs_train.pruners.evs import EVS
from evs_train.rates import Rates
from evs_train.samplers import build_sampler
from evs_train.tally import Tally

SCORED_WITH_DEEPSTACK = ("qwen3_vl", "qwen3_vl_moe")
"""Families whose engines score the pooled embeddings with the deepstack features behind them (docs/serving.md)."""


class Rig:
    """A tiny model of one family, its rows as examples by id, and batches of them at any rate."""

    def __init__(
        self, checkpoint: Path, rows: Path, dtype: torch.dtype = torch.float32, section: ModelSection | None = None
    ) -> None:
        section = section or ModelSection(path=str(checkpoint), dtype="float32")
        self.family = load_family(section, DataSection(rows=str(rows)))
        self.model: Any = load_weights(section, self.family.config, dtype)
        self.seed = 0
        self._stored = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        samples = read_rows([rows])
        reader = RowReader(samples, self.family, FrameSampling(fps=8.0))
        drawn = [dataclasses.replace(reader.read(number), draw=number) for number in range(len(samples))]
        self.examples: dict[str, Example] = {example.sample_id: example for example in drawn}

    def reseed(self, seed: int) -> None:
        """Other random weights in the same model, of each tensor's own scale; seed 0 gives back the checkpoint's.

        Vectors are moved off the ones and zeros of a new model, where a norm or a bias would not show.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters() if seed != self.seed else ():
                stored = self._stored[name]
                noise = torch.randn(stored.shape, generator=generator).to(stored.dtype)
                other = noise * stored.std() if stored.ndim > 1 else stored + 0.1 * noise
                parameter.copy_(other if seed else stored)
        self.seed = seed

    def batch(self, names: Sequence[str], rate: Any = 0.0, **options: Any) -> dict[str, Any]:
        collator = Collator(
            rates=Rates(build_sampler(rate), cap=options.pop("cap", False)),
            pad_token_id=self.family.pad_token_id,
            merge_media=self.family.merge_media,
            **options,
        )
        return collator([Examples(0, [self.examples[name] for name in names])])

    def forward(self, batch: dict[str, Any], **options: Any) -> tuple[Any, EvsHook]:
        """As training does it: logits (1, S, V), and their mean cross-entropy as `loss`."""
        hook = EvsHook(self.family, self.model, **options)
        handle = hook.attach(self.model)
        try:
            out = self.model(**batch)
        finally:
            handle.remove()
        if "plan" in batch:
            out.loss = mean_loss(out, hook)
        return out, hook

    def full(self, batch: dict[str, Any], **options: Any) -> tuple[Any, Tensor]:
        """The plain forward on the pruned batch: all logits and the model's own loss; and the labels (B, L')."""
        inputs = EvsHook(self.family, self.model, **options).prune(batch)
        return self.model(**inputs), inputs["labels"]

    def attention_arguments(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What the hook tells attention about this batch, pruned to the first tokens of each video."""
        chosen = [Choice(torch.arange(planned.num_retained)) for planned in batch["plan"].videos]
        documents = compact(batch, chosen, self.family.pad_token_id)["documents"]
        hook = EvsHook(self.family, self.model)
        return hook._attention(batch["plan"], batch["index"]["boundaries"], documents)

    def device_half(self, batch: dict[str, Any], encoding: Encoding, pruner: Pruner = EVS) -> dict[str, Any]:
        """What the model is called with, by all that runs on the device beside encoder and model; the loss is counted.

        `encoding`: the features of the batch. The counted loss is that of logits that are all zero. Also returned: the
        `targets` (S,) of the loss.
        """
        hook, plan = EvsHook(self.family, self.model, pruner), batch["plan"]
        head = self.family.output_embeddings(self.model)
        inputs = hook._for_training(batch, encoding, {})
        (gather,) = head._forward_pre_hooks.values()
        (hidden,) = gather(head, (torch.zeros(*plan.shape, 1, device=hook.targets.device),))
        losses = cross_entropies(hidden[0].expand(-1, len(self.family.processor.tokenizer)), hook.targets)
        tally = Tally(hides=pruner.hides)
        tally.add(plan, hook.hidden)
        tally.add_pass(plan, losses)
        return inputs | {"targets": hook.targets}

    def gradients(self) -> dict[str, Tensor | None]:
        """Gradients of all trained parameters."""
        trained = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        return {name: p.grad if p.grad is None else p.grad.clone() for name, p in trained}


def mean_loss(out: Any, hook: EvsHook) -> Tensor:
    """Of a forward of training, as transformers' forward gives it where no number of tokens is told."""
    return cross_entropies(out.logits[0], hook.targets).mean()


def logits_of_rows(logits: Tensor, plan: BatchPlan) -> list[Tensor]:
    """(L_i, V) logits of each row of a padded or packed batch."""
    if plan.packed:
        return list(logits[0].split(plan.num_tokens))
    return [row[:length] for row, length in zip(logits, plan.num_tokens, strict=True)]


def predicting(values: Tensor, labels: Tensor) -> Tensor:
    """Of values (B, L', ...) those at the places that predict a supervised token of `labels` (B, L')."""
    return torch.cat([row[:-1][told[1:] != IGNORE_INDEX] for row, told in zip(values, labels, strict=True)])


def captured_inputs(rig: Rig, batch: dict[str, Any]) -> dict[str, Any]:
    """What the hook hands to the model."""
    seen: dict[str, Any] = {}
    handle = rig.model.register_forward_hook(lambda m, a, kwargs, out: seen.update(kwargs), with_kwargs=True)
    try:
        rig.forward(batch)
    finally:
        handle.remove()
    return seen


def attention_mask(batch: dict[str, Any]) -> Tensor:
    """1 at the real tokens of an unpruned batch. Padding lies after the last token that is always kept or a video's."""
    mask = torch.zeros_like(batch["input_ids"]).flatten()
    mask[torch.cat([batch["index"]["always"], batch["index"]["video"]])] = 1
    return mask.view_as(batch["input_ids"])


def plain_media(rig: Rig, batch: dict[str, Any]) -> dict[str, Any]:
    """Encoder inputs as the plain forward takes them: videos of one length stacked, where the family keeps a list.

    InternVL's takes frames and tiles as one, in reading order.
    """
    media: dict[str, Any] = batch["media"]
    if rig.family.model_type != "internvl":
        return {name: torch.stack(value) if isinstance(value, list) else value for name, value in media.items()}
    images, videos = (iter(media.get(name, ())) for name in ("pixel_values", "pixel_values_videos"))
    pixels = [next(videos if planned.item.kind == "video" else images) for planned in batch["plan"].items]
    return {"pixel_values": torch.cat(pixels)} if pixels else {}


def plain_positions(batch: dict[str, Any]) -> Tensor:
    """Positions as the plain forward takes them: (B, L) where they are 1-D."""
    positions: Tensor = batch["position_ids"]
    return positions[0] if len(positions) == 1 else positions


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
            scored = torch.cat(features, -1) if rig.family.model_type in SCORED_WITH_DEEPSTACK else features[0]
            shaped = scored[: planned.item.num_tokens].view(planned.item.num_units, planned.item.tokens_per_unit, -1)
            kept[where[slow_retained(shaped, planned.pruning_rate)]] = True
    return kept.view_as(batch["input_ids"])


def plain_forward_fails(rig: Rig, batch: dict[str, Any]) -> bool:
    """GLM's fails for images beside videos (tests/test_upstream.py), LLaVA's for videos of different length."""
    media, family = batch["media"], rig.family.model_type
    if family == "llava_onevision":
        return len({len(video) for video in media.get("pixel_values_videos", ())}) > 1
    return family.startswith("glm") and {"image_grid_thw", "video_grid_thw"} <= media.keys()


def unpruned_embeds(rig: Rig, batch: dict[str, Any]) -> Tensor:
    """(B, L, D) what the language model reads of the unpruned batch: embedded ids, media features in their places."""
    ids, config, media = batch["input_ids"], rig.family.config, batch["media"]
    embeds: Tensor = rig.model.get_input_embeddings()(ids)
    encoded = {
        kind: iter(rig.family.encode(rig.model, media, kind) if rig.family.num_encoder_calls(media, kind) else ())
        for kind in KINDS
    }
    features = [next(encoded[planned.item.kind])[0] for planned in batch["plan"].items]
    placeholders = [token for token in (config.image_token_id, config.video_token_id) if token is not None]
    places = torch.isin(ids, torch.tensor(placeholders))
    return embeds.masked_scatter(places.unsqueeze(-1), torch.cat(features)) if features else embeds


def language_model_logits(rig: Rig, embeds: Tensor, attention_mask: Tensor, position_ids: Tensor | None) -> Tensor:
    """Logits of the plain language model, which knows nothing of media. Nemotron's has its head, and no positions."""
    inputs = {"inputs_embeds": embeds, "attention_mask": attention_mask}
    logits: Tensor
    if position_ids is None:
        logits = rig.model.language_model(**inputs).logits
    else:
        logits = rig.model.lm_head(rig.model.model.language_model(**inputs, position_ids=position_ids)[0])
    return logits


def supervised(labels: Tensor) -> list[list[int]]:
    """Supervised ids of each row, in order."""
    return [row[row != IGNORE_INDEX].tolist() for row in labels]
