"""Nemotron Nano 12B v2 VL (`NemotronH_Nano_VL_V2`): code that comes with the checkpoint; a frame is a temporal unit.

Untested with the released weights and code, which the tests replace by a stand-in. What is here was read:
- modeling: copies of the release's modeling.py; its forward encodes `pixel_values` always, scatters the tiles whose
  `image_flags` is 1, takes no features, and averages the loss over a micro-batch;
- prompt and tiles: TensorRT-LLM (`modeling_nemotron_nano.py`), SGLang (`nano_nemotron_vl.py`). A video is "This is a
  video:" and a line per frame, "Frame 1 sampled at 0.00 seconds: <img>...</img>"; a frame is one tile.

So the features go in as `inputs_embeds`, and forward is given one black tile that it encodes and drops, besides ids
without placeholders. Cost: that tile in every step.
What this family cannot do: packing (Mamba layers), float32 (the code computes features in bfloat16), and keeping what
the tower says (`data.cache_features`). The code asks
torch.distributed for its rank (start with torchrun), and imports mamba-ssm, timm and einops.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL.Image import fromarray
from torch import Tensor, nn

from evs_train.config import Part, Positions
from evs_train.data.chat import Kind, Media, MediaItem, Picture, Prepared
from evs_train.data.video import Clip
from evs_train.models.base import Family, Features, expanded, reading_order

INPUTS: dict[Kind, str] = {"image": "pixel_values", "video": "pixel_values_videos"}


class NemotronNanoVLV2(Family):
    """Adapter of Nemotron Nano 12B v2 VL."""

    model_type: ClassVar[str] = "NemotronH_Nano_VL_V2"
    parts: ClassVar[Mapping[Part, tuple[str, ...]]] = {
        "projector": ("mlp1.",),
        "vision": ("vision_model.",),
        "language_model": ("language_model.",),
    }
    # As in Nemotron Omni without Mamba's out_proj, whose weight the fused kernel reads by itself.
    lora_targets: ClassVar[tuple[str, ...]] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "up_proj", "down_proj",
    )  # fmt: skip
    shares_encoder: ClassVar[bool] = True
    attention_only: ClassVar[bool] = False
    reads_pixels: ClassVar[bool] = True

    def __init__(
        self,
        config: Any,
        processor: Any,
        video_kwargs: Mapping[str, Any] = {},
        image_kwargs: Mapping[str, Any] = {},
        positions: Positions = "preserve",
    ) -> None:
        super().__init__(config, processor, video_kwargs, image_kwargs, positions)
        processor.video_token, processor.image_token = config.video_context_token, config.img_context_token
        self._of_frames = copy.copy(processor.image_processor)
        self._of_frames.max_num_tiles = 1
        self._side = int(config.force_image_size // config.patch_size * config.downsample_ratio)  # tokens

    def prepare(self, text: str, clips: Sequence[Clip], images: Sequence[Picture]) -> Prepared:
        video_token, image_token = self.processor.video_token, self.processor.image_token
        media: dict[str, list[Tensor]] = {}
        items: dict[Kind, list[MediaItem]] = {"video": [], "image": []}
        texts: dict[str, list[str]] = {video_token: [], image_token: []}
        tile = image_token * self._side**2
        for clip in clips:
            frames = [fromarray(frame) for frame in clip.frames]
            inputs = self._of_frames(frames, return_tensors="pt", **self.video_kwargs)
            media.setdefault("pixel_values_videos", []).append(inputs["pixel_values"])  # (F, 3, S, S)
            milliseconds = int(1000 / clip.fps)  # the engines' rounding
            seconds = [index * milliseconds / 1000 for index in clip.frame_indices]
            lines = [
                f"Frame {i} sampled at {s:.2f} seconds: <img>{tile}</img>\n" for i, s in enumerate(seconds, start=1)
            ]
            texts[video_token].append("This is a video:\n" + "".join(lines))
            items["video"].append(MediaItem("video", len(frames), self._side, self._side))
        if images:
            inputs = self.processor.image_processor(list(images), return_tensors="pt", **self.image_kwargs)
            media["pixel_values"] = list(inputs["pixel_values"].split([int(n) for n in inputs["num_patches"]]))
            for tiles in media["pixel_values"]:  # (tiles, 3, S, S)
                texts[image_token].append(f"<img>{tile * len(tiles)}</img>")
                items["image"].append(MediaItem("image", 1, 1, len(tiles) * self._side**2))
        order = reading_order(text, {"video": video_token, "image": image_token}, items)
        ids = self.processor.tokenizer(expanded(text, texts), add_special_tokens=False, return_tensors="pt")[
            "input_ids"
        ][0]
        return Prepared(ids, dict(media), order, ids == self.config.img_context_token_id)

    def encode(self, model: Any, media: Media, kind: Kind) -> list[Features]:
        pixels: list[Tensor] = media[INPUTS[kind]]
        embeds = model.extract_feature(torch.cat(pixels).to(model.dtype))  # (tiles, N, D)
        return [[of_one.flatten(0, 1)] for of_one in embeds.split([len(one) for one in pixels])]

    def patches_per_token(self, kind: Kind) -> float:
        return float(1 / self.config.downsample_ratio**2)

    def num_encoder_calls(self, media: Media, kind: Kind) -> int:
        return int(INPUTS[kind] in media)

    def blank(self, kind: Kind) -> Media:
        return {INPUTS[kind]: [torch.zeros(1, 3, self.config.force_image_size, self.config.force_image_size)]}

    def output_embeddings(self, model: Any) -> nn.Module:
        return super().output_embeddings(model.language_model)

    def encoder_outputs(self, features: Sequence[tuple[Kind, Features]]) -> dict[str, Any]:
        return {"embeds": torch.cat([item[0] for _, item in features])} if features else {}  # (all retained tokens, D)

    def forward_inputs(
        self, model: Any, inputs: dict[str, Any], features: Sequence[tuple[Kind, Features]]
    ) -> dict[str, Any]:
        ids: Tensor = inputs["input_ids"]
        embeds: Tensor = model.language_model.get_input_embeddings()(ids)  # (B, L, D)
        for retained in self.encoder_outputs(features).values():
            places = (ids == self.config.img_context_token_id)[..., None]
            embeds = embeds.masked_scatter(places, retained.to(embeds.dtype))
        return {
            "inputs_embeds": embeds,
            "input_ids": torch.full_like(ids, self.pad_token_id),
            "attention_mask": inputs["attention_mask"],
            "labels": inputs["labels"],
            "pixel_values": embeds.new_zeros(1, 3, self.config.force_image_size, self.config.force_image_size),
            "image_flags": torch.zeros(1, 1, dtype=torch.int64, device=ids.device),
        }
