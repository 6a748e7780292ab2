"""LLaVA-OneVision (`llava_onevision`): SigLIP tower, Qwen2 text model with 1-D positions, a unit for every frame.

A frame becomes N = ceil(side / 2)**2 tokens for side x side patches (196 in the releases). Behind the T * N tokens of a
video stands one more `<video>` placeholder, for the trained `image_newline`; it always stays. There is no time: neither
the text nor the positions say when a frame was sampled, so the model sees the order of the frames only, and preserved
positions are the one trace of where tokens were dropped.

The tower sees every frame by itself. So all frames of a batch run through it in one call, as one long video, whatever
the videos' lengths, and each video then gets the newline behind its own tokens.

An image alone in its row is cut into tiles ("anyres", with a newline behind each line of tokens); several images in a
row are one tile each. `batch_num_images` (images of each row that has some) tells the model which is which.

The release's template opens an answer with "assistant", a blank and a newline, and the prompt without the blank (read:
as quoted in other projects); `normalized` leaves it out of both. It puts a turn's images first, then its videos.

What this family cannot do: tell times. `vision_feature_layer` is taken to be -1, as in the releases; the tower's last
norm comes behind that layer and never gets a gradient, so it is frozen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from evs_train.config import Part
from evs_train.data.chat import Kind, Media, MediaItem, Picture, Prepared
from evs_train.data.video import Clip
from evs_train.models.base import GATED_LAYERS, Features, OneDimensional, frames_tensor, joined


class LlavaOnevision(OneDimensional):
    """Adapter of LLaVA-OneVision."""

    model_type: ClassVar[str] = "llava_onevision"
    parts: ClassVar[Mapping[Part, tuple[str, ...]]] = {
        "projector": ("model.multi_modal_projector.", "model.image_newline"),
        "vision": ("model.vision_tower.",),
        "language_model": ("model.language_model.", "lm_head."),
    }
    unused: ClassVar[tuple[str, ...]] = ("model.vision_tower.post_layernorm.",)
    lora_targets: ClassVar[tuple[str, ...]] = GATED_LAYERS
    shares_encoder: ClassVar[bool] = True
    projector_entries: ClassVar[tuple[str, ...]] = ("model.multi_modal_projector",)

    def normalized(self, text: str) -> str:
        return text.replace("<|im_start|>assistant \n", "<|im_start|>assistant\n")

    def prepare(self, text: str, clips: Sequence[Clip], images: Sequence[Picture]) -> Prepared:
        # Without `return_tensors`: videos and tiled images differ in length, and a list cannot be stacked.
        batch = self.processor(
            text=[text],
            images=[list(images)] if images else None,  # nested: these images stand in one row
            videos=[frames_tensor(clip) for clip in clips] or None,
            images_kwargs={**self.image_kwargs, "do_pad": False},
            videos_kwargs={"do_sample_frames": False, **self.video_kwargs},
            return_text_replacement_offsets=True,
        )
        ids = torch.tensor(batch["input_ids"][0])
        media: Media = {}
        if clips:
            media["pixel_values_videos"] = list(batch["pixel_values_videos"])  # each (F, 3, H, W)
        if images:
            media["pixel_values"] = torch.cat(list(batch["pixel_values"]))  # (tiles of all images, 3, H, W)
            media["image_sizes"] = torch.tensor([list(size) for size in batch["image_sizes"]])
            media["batch_num_images"] = torch.tensor(batch["batch_num_images"])
        placeholders = {"video": self.processor.video_token, "image": self.processor.image_token}
        frames = iter([len(clip.frames) for clip in clips])
        items: list[MediaItem] = []
        lengths: list[int] = []
        for found in batch["text_replacement_offsets"][0]:  # in reading order
            lengths.append(found["replacement"].count(placeholders[found["type"]]))
            if found["type"] == "video":
                num_frames = next(frames)
                side = round(((lengths[-1] - 1) // num_frames) ** 0.5)
                items.append(MediaItem("video", num_frames, side, side))
            else:
                items.append(MediaItem("image", 1, 1, lengths[-1]))
        mask = (ids == self.config.video_token_id) | (ids == self.config.image_token_id)
        ends = torch.tensor(lengths, dtype=torch.int64).cumsum(0) - 1
        newlines = ends[torch.tensor([item.kind == "video" for item in items], dtype=torch.bool)]
        mask[torch.nonzero(mask)[newlines, 0]] = False
        return Prepared(ids, media, tuple(items), mask)

    def encode(self, model: Any, media: Media, kind: Kind) -> list[Features]:
        if kind == "image":
            inputs = {name: media[name] for name in ("pixel_values", "image_sizes", "batch_num_images")}
            out = model.get_image_features(**inputs, return_dict=True)
            return [[embeds] for embeds in out.pooler_output]
        videos = media["pixel_values_videos"]
        rows = model.get_video_features(torch.cat(videos)[None], return_dict=True).pooler_output[0]
        return _of_videos(rows, [len(video) for video in videos])

    def split_media(self, media: Media, kind: Kind) -> list[Media]:
        if kind == "video":
            return super().split_media(media, kind)
        if "pixel_values" not in media:
            return []
        row = media["batch_num_images"]  # one number: more than one says that an image is not tiled
        tiles = media["pixel_values"].chunk(int(row))  # a row has one image of many tiles, or images of one
        sizes = media["image_sizes"].split(1)
        return [
            {"pixel_values": own, "image_sizes": size, "batch_num_images": row}
            for own, size in zip(tiles, sizes, strict=True)
        ]

    def project(self, model: Any, media: Media, kind: Kind, towers: Sequence[list[Tensor]]) -> list[Features]:
        inner = model.model
        outputs = [one for (one,) in towers]  # each (frames or tiles, patches, hidden)
        counts = [len(one) for one in outputs]
        embeds = self.projected(model, 0, joined(outputs))
        if kind == "image":
            ratio = self.config.vision_aspect_ratio
            packed, _ = inner.pack_image_features(
                embeds.split(counts), media["image_sizes"], image_newline=inner.image_newline, vision_aspect_ratio=ratio
            )
            return [[rows] for rows in packed]
        pooled = inner.apply_pooling(embeds).flatten(0, 1)
        return _of_videos(torch.cat([pooled, inner.image_newline[None]]), counts)

    def patches_per_token(self, kind: Kind) -> float:
        # Videos are pooled behind the projector; images in tiles have a little more, in the padding.
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        return float((side / math.ceil(side / 2)) ** 2 if kind == "video" else 1)

    def tower_values(self, kind: Kind) -> float:
        return float(self.config.vision_config.hidden_size * self.patches_per_token(kind))

    def num_encoder_calls(self, media: Media, kind: Kind) -> int:
        return int(("pixel_values_videos" if kind == "video" else "pixel_values") in media)

    def blank(self, kind: Kind) -> Media:
        side = self.config.vision_config.image_size
        if kind == "video":
            return {"pixel_values_videos": [torch.zeros(1, 3, side, side)]}
        return {  # two images in a row, since a single one would be tiled
            "pixel_values": torch.zeros(2, 3, side, side),
            "image_sizes": torch.tensor([[side, side]] * 2),
            "batch_num_images": torch.tensor([2]),
        }

    def encoder_outputs(self, features: Sequence[tuple[Kind, Features]]) -> dict[str, Any]:
        of = {kind: tuple(item[0] for one, item in features if one == kind) for kind in ("image", "video")}
        outputs = {}
        if of["image"]:
            outputs["image"] = BaseModelOutputWithPooling(pooler_output=of["image"])
        if of["video"]:  # the model flattens the first two dimensions of a tensor (batch, rows, D)
            outputs["video"] = BaseModelOutputWithPooling(pooler_output=torch.cat(of["video"])[None])
        return outputs


def _of_videos(rows: Tensor, num_frames: Sequence[int]) -> list[Features]:
    """Features of each video, from (all T * N + 1, D) rows of all of them and the newline."""
    per_frame = (len(rows) - 1) // sum(num_frames)
    *embeds, newline = rows.split([*(count * per_frame for count in num_frames), 1])
    return [[torch.cat([one, newline])] for one in embeds]
