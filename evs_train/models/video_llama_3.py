"""VideoLLaMA 3 (`video_llama_3`): a vision tower for any size, Qwen2 text model with 1-D positions, a unit per frame.

Time is in the text: "Time 1.0s:" before each frame's tokens, the frames joined by commas. All of it stays, even before
a frame that kept no token. A video's patches are merged 2 x 2, an image's not at all (`video_merge_sizes`,
`image_merge_sizes`). The tower sees every frame by itself.

The released processor prunes video by itself (`use_token_compression`): tokens whose pixels differ by little from the
frame before are left out of the prompt, as many as the clip has. EVS replaces that, so it is off while training,
whatever the recipe says. It must be off at inference as well (`use_token_compression: false` for the video processor),
or a pruned model is pruned twice; the export leaves the processor's files as they were.

What this family cannot do: more than one frame per unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from evs_train.config import Part
from evs_train.data.chat import Kind, Media, MediaItem, Picture, Prepared
from evs_train.data.video import Clip, video_metadata
from evs_train.models.base import GATED_LAYERS, Features, OneDimensional, frames_tensor, reading_order, split_patches
from evs_train.models.changes import of_patches

INPUTS: dict[Kind, tuple[str, str, str]] = {
    "video": ("pixel_values_videos", "video_grid_thw", "video_merge_sizes"),
    "image": ("pixel_values", "image_grid_thw", "image_merge_sizes"),
}


class VideoLlama3(OneDimensional):
    """Adapter of VideoLLaMA 3 in the Hugging Face format."""

    model_type: ClassVar[str] = "video_llama_3"
    parts: ClassVar[Mapping[Part, tuple[str, ...]]] = {
        "projector": ("model.projector.",),
        "vision": ("model.vision_model.",),
        "language_model": ("model.language_model.", "lm_head."),
    }
    lora_targets: ClassVar[tuple[str, ...]] = GATED_LAYERS
    shares_encoder: ClassVar[bool] = True
    projector_entries: ClassVar[tuple[str, ...]] = ("model.projector",)
    reads_pixels: ClassVar[bool] = True  # its mask of compressed tokens, which is full here, is made beside the pixels

    def prepare(self, text: str, clips: Sequence[Clip], images: Sequence[Picture]) -> Prepared:
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
                "use_token_compression": False,
            },
        )
        media: Media = {name: batch[name] for names in INPUTS.values() for name in names if name in batch}
        items: dict[Kind, list[MediaItem]] = {"video": [], "image": []}
        for kind, (_, grids, merge_sizes) in INPUTS.items():
            if grids in media:
                sizes = zip(media[grids].tolist(), media[merge_sizes].tolist(), strict=True)
                items[kind] = [MediaItem(kind, t, h // merge, w // merge) for (t, h, w), merge in sizes]
        placeholders: dict[Kind, str] = {"video": self.processor.video_token, "image": self.processor.image_token}
        ids = batch["input_ids"][0]
        is_media = (ids == self.config.video_token_id) | (ids == self.config.image_token_id)
        return Prepared(ids, media, reading_order(text, placeholders, items), is_media)

    def changes(self, prepared: Prepared) -> tuple[Tensor, ...]:
        return of_patches(prepared, self.split_media(prepared.media, "video"))

    def encode(self, model: Any, media: Media, kind: Kind) -> list[Features]:
        inputs = {name: media[name] for name in INPUTS[kind]}
        encoder = model.get_video_features if kind == "video" else model.get_image_features
        return [[embeds] for embeds in encoder(**inputs, return_dict=True).pooler_output]

    def split_media(self, media: Media, kind: Kind) -> list[Media]:
        return split_patches(media, *INPUTS[kind])

    def tower_values(self, kind: Kind) -> float:
        return float(self.config.vision_config.hidden_size)

    def num_encoder_calls(self, media: Media, kind: Kind) -> int:
        return int(INPUTS[kind][0] in media)

    def blank(self, kind: Kind) -> Media:
        vision = self.config.vision_config
        pixels = torch.zeros(1, vision.num_channels * vision.patch_size**2)
        return dict(zip(INPUTS[kind], (pixels, torch.ones(1, 3, dtype=torch.int64), torch.tensor([1])), strict=True))
