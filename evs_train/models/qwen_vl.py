"""What the Qwen and GLM families share: one processor call per sample, m-RoPE positions, flat patches with their grids.

Positions are computed with the model's own `get_rope_index` on the unpruned ids, on the host; kept tokens keep theirs,
and text after a video keeps its place. Which tokens are a video's and which an image's is told by their order, not by
their ids: GLM has one id for both. A family adds what its encoder returns, if that is more than pooled embeddings, and
what the engines score.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel

from evs_train.config import Positions
from evs_train.data.chat import Kind, Media, MediaItem, Picture, Prepared
from evs_train.data.video import Clip, video_metadata
from evs_train.models.base import Family, Features, frames_tensor, reading_order, split_patches
from evs_train.models.changes import of_patches

POSITION_INPUTS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
MEDIA_INPUTS = ("pixel_values", "pixel_values_videos", *POSITION_INPUTS)
ENCODER_INPUTS: dict[Kind, tuple[str, str]] = {
    "video": ("pixel_values_videos", "video_grid_thw"),
    "image": ("pixel_values", "image_grid_thw"),
}
TOKEN_TYPES: dict[Kind, int] = {"image": 1, "video": 2}  # `mm_token_type_ids` of transformers; 0 is text


class QwenVL(Family):
    """Base of the Qwen VL and GLM-V adapters."""

    shares_encoder: ClassVar[bool] = True
    projector_entries: ClassVar[tuple[str, ...]] = ("model.visual.merger",)

    def __init__(
        self,
        config: Any,
        processor: Any,
        video_kwargs: Mapping[str, Any] = {},
        image_kwargs: Mapping[str, Any] = {},
        positions: Positions = "preserve",
    ) -> None:
        super().__init__(config, processor, video_kwargs, image_kwargs, positions)
        shallow = copy.deepcopy(config)
        shallow.text_config.num_hidden_layers = 1
        shallow.vision_config.depth = 1
        with torch.device("meta"):  # no weights: only its position arithmetic is used
            self._positions_of = AutoModel.from_config(shallow).get_rope_index

    def prepare(self, text: str, clips: Sequence[Clip], images: Sequence[Picture]) -> Prepared:
        clips = [self._whole_unit(clip) for clip in clips]
        batch = self.processor(
            text=[text],
            images=list(images) or None,
            videos=[frames_tensor(clip) for clip in clips] or None,
            return_tensors="pt",
            images_kwargs=self.image_kwargs,
            videos_kwargs={
                "video_metadata": [video_metadata(clip) for clip in clips],
                "do_sample_frames": False,
                **self.video_kwargs,
            },
        )
        media = {name: batch[name] for name in MEDIA_INPUTS if name in batch}
        placeholders: dict[Kind, str] = {"video": self.processor.video_token, "image": self.processor.image_token}
        items: dict[Kind, list[MediaItem]] = {
            "video": self._items("video", media.get("video_grid_thw")),
            "image": self._items("image", media.get("image_grid_thw")),
        }
        ids = batch["input_ids"][0]
        return Prepared(
            input_ids=ids,
            media=media,
            items=reading_order(text, placeholders, items),
            media_mask=batch["mm_token_type_ids"][0] != 0,
        )

    def _whole_unit(self, clip: Clip) -> Clip:
        """A still, for a whole unit: processors repeat the last frame of odd clips; Qwen3-VL's refuses a single one."""
        missing = self.config.vision_config.temporal_patch_size - len(clip.frames)
        if missing <= 0:
            return clip
        return dataclasses.replace(
            clip,
            frames=np.pad(clip.frames, ((0, missing), (0, 0), (0, 0), (0, 0)), mode="edge"),
            frame_indices=[*clip.frame_indices, *clip.frame_indices[-1:] * missing],
            timestamps=np.pad(clip.timestamps, (0, missing), mode="edge"),
        )

    def _items(self, kind: Kind, grid_thw: Tensor | None) -> list[MediaItem]:
        if grid_thw is None:
            return []
        merge = self.config.vision_config.spatial_merge_size
        return [MediaItem(kind, t, h // merge, w // merge) for t, h, w in grid_thw.tolist()]

    def position_ids(self, prepared: Prepared) -> Tensor:
        types = torch.zeros_like(prepared.input_ids)
        of_items = [torch.full((item.num_tokens,), TOKEN_TYPES[item.kind]) for item in prepared.items]
        types[prepared.media_mask] = torch.cat([types[:0], *of_items])
        inputs = {name: prepared.media[name] for name in POSITION_INPUTS if name in prepared.media}
        positions: Tensor = self._positions_of(prepared.input_ids[None], types[None], **inputs)[0]
        return positions[:, 0]  # (3, 1, L) -> (3, L)

    def changes(self, prepared: Prepared) -> tuple[Tensor, ...]:
        return of_patches(prepared, self.split_media(prepared.media, "video"))

    def encode(self, model: Any, media: Media, kind: Kind) -> list[Features]:
        return [[embeds] for embeds in self._encoded(model, media, kind).pooler_output]

    def _encoded(self, model: Any, media: Media, kind: Kind) -> Any:
        """What the model's encoder returns for all videos, or all images, of a batch."""
        if kind == "video":
            return model.get_video_features(media["pixel_values_videos"], media["video_grid_thw"], return_dict=True)
        return model.get_image_features(media["pixel_values"], media["image_grid_thw"], return_dict=True)

    def split_media(self, media: Media, kind: Kind) -> list[Media]:
        pixels, grid = ENCODER_INPUTS[kind]
        return split_patches(media, pixels, grid)

    def tower_values(self, kind: Kind) -> float:
        vision = self.config.vision_config
        return float(vision.hidden_size * vision.spatial_merge_size**2)

    def num_encoder_calls(self, media: Media, kind: Kind) -> int:
        return int(ENCODER_INPUTS[kind][1] in media)

    def blank(self, kind: Kind) -> Media:
        vision = self.config.vision_config
        side = vision.spatial_merge_size
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.zeros(side * side, patch)
        grid = torch.tensor([[1, side, side]])
        if kind == "video":
            return {"pixel_values_videos": pixels, "video_grid_thw": grid}
        return {"pixel_values": pixels, "image_grid_thw": grid}
