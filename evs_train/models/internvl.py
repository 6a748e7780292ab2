"""InternVL 3 in transformers' format (`internvl`): frames go through the image entry, one 1-D position per token.

A frame is a temporal unit, resized to one square tile (448 px and 256 tokens in the releases), with "Frame1: " before
its `<img>...</img>`. An image is one or more tiles and a thumbnail. Frames and tiles stand under one placeholder id, so
their features travel as one tensor in reading order. All frames of a batch are one tower call, all tiles another.
The releases stretch rotary embeddings beyond 32768 positions (`rope_type: dynamic`): preserved positions count the
unpruned video for that, sequential ones the retained tokens.

Every parameter of a released tower is used: they read its last layer and have no mask token. A config with another
`vision_feature_layer` would leave the layers behind it without gradients. No engine is known to prune this family; the
scored tensor is the pooled embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from evs_train.config import Part
from evs_train.data.chat import Kind, Media, MediaItem, Picture, Prepared
from evs_train.data.video import Clip
from evs_train.models.base import GATED_LAYERS, Features, OneDimensional, expanded, frames_tensor, reading_order

INPUTS: dict[Kind, str] = {"image": "pixel_values", "video": "pixel_values_videos"}


class InternVL(OneDimensional):
    """Adapter of InternVL 3."""

    model_type: ClassVar[str] = "internvl"
    parts: ClassVar[Mapping[Part, tuple[str, ...]]] = {
        "projector": ("model.multi_modal_projector.",),
        "vision": ("model.vision_tower.",),
        "language_model": ("model.language_model.", "lm_head."),
    }
    lora_targets: ClassVar[tuple[str, ...]] = GATED_LAYERS
    shares_encoder: ClassVar[bool] = True
    projector_entries: ClassVar[tuple[str, ...]] = ("model.multi_modal_projector",)

    def prepare(self, text: str, clips: Sequence[Clip], images: Sequence[Picture]) -> Prepared:
        processor = self.processor
        placeholders: dict[Kind, str] = {"video": processor.video_token, "image": processor.image_token}
        media: dict[str, list[Tensor]] = {}
        items: dict[Kind, list[MediaItem]] = {"video": [], "image": []}
        texts: dict[str, list[str]] = {placeholder: [] for placeholder in placeholders.values()}
        for clip in clips:
            inputs = processor.video_processor(
                videos=[frames_tensor(clip)], do_sample_frames=False, return_tensors="pt", **self.video_kwargs
            )
            texts[processor.video_token].append(processor.replace_video_token(inputs, 0))
            frames = inputs["pixel_values_videos"][0]  # (F, 3, S, S)
            media.setdefault("pixel_values_videos", []).append(frames)
            side = self._side(frames)
            items["video"].append(MediaItem("video", len(frames), side, side))
        if images:
            options = {**processor.images_kwargs, **self.image_kwargs}  # the processor asks for tiles, not its part
            inputs = processor.image_processor(images=list(images), return_tensors="pt", **options)
            media["pixel_values"] = list(inputs["pixel_values"].split([int(n) for n in inputs["num_patches"]]))
            for index, tiles in enumerate(media["pixel_values"]):  # (tiles, 3, S, S)
                texts[processor.image_token].append(processor.replace_image_token(inputs, index))
                items["image"].append(MediaItem("image", 1, 1, len(tiles) * self._side(tiles) ** 2))
        order = reading_order(text, placeholders, items)
        ids = processor.tokenizer(expanded(text, texts), return_tensors="pt")["input_ids"][0]
        return Prepared(ids, dict(media), order, ids == self.config.image_token_id)

    def _side(self, pixels: Tensor) -> int:
        """Tokens along a side of a tile."""
        return int(pixels.shape[-1] // self.config.vision_config.patch_size[0] * self.config.downsample_ratio)

    def encode(self, model: Any, media: Media, kind: Kind) -> list[Features]:
        pixels: list[Tensor] = media[INPUTS[kind]]
        embeds = model.get_image_features(
            pixel_values=torch.cat(pixels), return_dict=True
        ).pooler_output  # (tiles, N, D)
        return [[of_one.flatten(0, 1)] for of_one in embeds.split([len(one) for one in pixels])]

    def patches_per_token(self, kind: Kind) -> float:
        return float(1 / self.config.downsample_ratio**2)

    def tower_values(self, kind: Kind) -> float:
        return float(self.config.vision_config.hidden_size * self.patches_per_token(kind))

    def num_encoder_calls(self, media: Media, kind: Kind) -> int:
        return int(INPUTS[kind] in media)

    def blank(self, kind: Kind) -> Media:
        vision = self.config.vision_config
        return {INPUTS[kind]: [torch.zeros(1, vision.num_channels, *vision.image_size)]}

    def encoder_outputs(self, features: Sequence[tuple[Kind, Features]]) -> dict[str, Any]:
        if not features:
            return {}
        embeds = torch.cat([item[0] for _, item in features])
        return {"image": BaseModelOutputWithPooling(pooler_output=embeds[None])}  # (1, all retained tokens, D)
