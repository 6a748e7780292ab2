"""Nemotron 3 Nano Omni (`nemotron_h_omni`): RADIO tower, hybrid Mamba/attention/MoE language model without positions.

Time lives in the text: "Frame 1 sampled at 0.00 seconds and frame 2 ...: " before each unit's `<img>...</img>` run. All
of it stays, even round a unit that kept no token. Videos and images share one placeholder id, so their features travel
as one sequence in reading order. The processor takes one video per call; here the same pieces expand any number.

What this family cannot do: packing (its Mamba layers take no document boundaries), audio while training.
The tower is called once per video, since clips differ in size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from evs_train.config import Part
from evs_train.data.chat import Kind, Media, MediaItem, Picture, Prepared
from evs_train.data.video import Clip, video_metadata
from evs_train.models.base import (
    NO_ADAPTER_ON_EXPERTS,
    Family,
    Features,
    expanded,
    frames_tensor,
    reading_order,
    split_patches,
)


class NemotronHOmni(Family):
    """Adapter of Nemotron Omni, without its audio."""

    model_type: ClassVar[str] = "nemotron_h_omni"
    parts: ClassVar[Mapping[Part, tuple[str, ...]]] = {
        "projector": ("multi_modal_projector.",),
        "vision": ("vision_model.",),
        "language_model": ("language_model.",),
    }
    # The norm is an identity that checkpoints do not store, so nothing trained into it could be exported.
    unused: ClassVar[tuple[str, ...]] = ("audio_tower.", "embed_audio.", "vision_final_layernorm.")
    # A scale of 1 that RADIO has no use for, and indices of outputs that nothing reads.
    not_stored: ClassVar[tuple[str, ...]] = (".lambda1", ".summary_idxs")
    # Statistics and filters that the processor has, too.
    not_loaded: ClassVar[tuple[str, ...]] = (
        "vision_model.radio_model.input_conditioner.",
        "sound_encoder.encoder.feature_extractor.",
    )
    lora_targets: ClassVar[tuple[str, ...]] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "in_proj",
        "up_proj",
        "down_proj",
    )
    # While training with mamba_ssm, transformers hands `out_proj.weight` to the kernel and never calls the layer.
    lora_refused: ClassVar[Mapping[str, str]] = {
        "out_proj": "Mamba's fused kernel reads that layer's weight by itself and passes an adapter by"
    }
    lora_note: ClassVar[str] = NO_ADAPTER_ON_EXPERTS
    shares_encoder: ClassVar[bool] = False
    projector_entries: ClassVar[tuple[str, ...]] = ("multi_modal_projector",)
    attention_only: ClassVar[bool] = False

    def prepare(self, text: str, clips: Sequence[Clip], images: Sequence[Picture]) -> Prepared:
        processor = self.processor
        placeholders: dict[Kind, str] = {"video": processor.video_token, "image": processor.image_token}
        media: Media = {}
        items: dict[Kind, list[MediaItem]] = {"video": [], "image": []}
        texts: dict[str, list[str]] = {placeholder: [] for placeholder in placeholders.values()}
        for clip in clips:
            metadata = video_metadata(clip)
            frames = frames_tensor(clip)
            with frames.device:  # the processor makes statistics there; counts stay numbers without `return_tensors`
                inputs = processor.video_processor(
                    videos=[frames], video_metadata=[metadata], do_sample_frames=False, **self.video_kwargs
                )
            pixels = inputs["pixel_values_videos"]  # (F, 3, H, W)
            media.setdefault("pixel_values_videos", []).append(pixels)
            texts[placeholders["video"]].append(
                processor.replace_video_token(inputs, 0, num_frames=len(pixels), video_metadata=metadata)
            )
            items["video"].append(self._video_item(pixels.shape))
        if images:
            inputs = processor.image_processor(images=list(images), return_tensors="pt", **self.image_kwargs)
            media |= {name: inputs[name] for name in ("pixel_values", "image_grid_hw")}
            merge = round(1 / self.config.downsample_ratio)
            for index, (height, width) in enumerate(inputs["image_grid_hw"].tolist()):
                texts[placeholders["image"]].append(processor.replace_image_token(inputs, index))
                items["image"].append(MediaItem("image", 1, height // merge, width // merge))
        order = reading_order(text, placeholders, items)
        ids = processor.tokenizer(expanded(text, texts), return_tensors="pt")["input_ids"][0]
        return Prepared(ids, media, order, ids == self.config.image_token_id)

    def _video_item(self, shape: Sequence[int]) -> MediaItem:
        num_frames, _, height, width = shape
        frames_per_unit = self.config.video_temporal_patch_size
        pixels_per_token = round(self.config.vision_config.patch_size / self.config.downsample_ratio)
        num_units = -(-num_frames // frames_per_unit)
        return MediaItem("video", num_units, height // pixels_per_token, width // pixels_per_token)

    def encode(self, model: Any, media: Media, kind: Kind) -> list[Features]:
        if kind == "image":
            out = model.get_image_features(media["pixel_values"], media["image_grid_hw"], return_dict=True)
            return [[embeds] for embeds in out.pooler_output]
        videos = (model.get_video_features(pixels, return_dict=True) for pixels in media["pixel_values_videos"])
        return [[out.pooler_output.flatten(0, 1)] for out in videos]  # (T, N, D) -> (T * N, D)

    def split_media(self, media: Media, kind: Kind) -> list[Media]:
        if kind == "image":
            return split_patches(media, "pixel_values", "image_grid_hw")
        return super().split_media(media, kind)

    def project(self, model: Any, media: Media, kind: Kind, towers: Sequence[list[Tensor]]) -> list[Features]:
        groups = [towers] if kind == "image" else [[one] for one in towers]  # as `encode` calls the tower
        features: list[Features] = []
        for group in groups:
            features += super().project(model, media, kind, group)
        return features

    def patches_per_token(self, kind: Kind) -> float:
        return float(int(1 / self.config.downsample_ratio) ** 2)

    def tower_values(self, kind: Kind) -> float:
        return float(self.config.vision_hidden_size * self.patches_per_token(kind))

    def num_projections(self, kind: Kind, count: int) -> int:
        return count if kind == "video" else super().num_projections(kind, count)

    def num_encoder_calls(self, media: Media, kind: Kind) -> int:
        return int("pixel_values" in media) if kind == "image" else len(media.get("pixel_values_videos", ()))

    def blank(self, kind: Kind) -> Media:
        side = round(1 / self.config.downsample_ratio)
        patch = self.config.vision_config.patch_size
        if kind == "image":
            return {
                "pixel_values": torch.zeros(side * side, 3 * patch**2),
                "image_grid_hw": torch.tensor([[side, side]]),
            }
        frames = self.config.video_temporal_patch_size
        return {"pixel_values_videos": [torch.zeros(frames, 3, side * patch, side * patch)]}

    def output_embeddings(self, model: Any) -> nn.Module:
        return super().output_embeddings(model.language_model)

    def encoder_outputs(self, features: Sequence[tuple[Kind, Features]]) -> dict[str, Any]:
        if not features:
            return {}
        # A tuple of tensors: transformers 5.23 concatenates `pooler_output` and fails on a single tensor.
        return {"video": BaseModelOutputWithPooling(pooler_output=tuple(item[0] for _, item in features))}
