"""Qwen2.5-VL: windowed vision attention, no deepstack; time is in the positions, not in the text.

All tokens of a video stand between one `<|vision_start|>` and one `<|vision_end|>`. Unit t of a video has the temporal
position `int(t * tokens_per_second * second_per_grid)` after the text before it, where second_per_grid is the video's
length times two over its sampled frames; the processor computes it from the clip's metadata, and it travels with the
encoder inputs. Text after a video or an image goes on behind the larger side of its grid, however long it is, as in
transformers 5.23; the model was published with text behind the last temporal position too. vLLM does the latter for an
unpruned video, and behind the grid's width when it prunes (`vllm/multimodal/evs.py`); `evs.positions: engine` follows.

Engines score the pooled embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from evs_train.config import Part, Positions
from evs_train.data.chat import Kind, Media, Prepared
from evs_train.models.base import GATED_LAYERS, Features
from evs_train.models.qwen_vl import ENCODER_INPUTS, QwenVL


class Qwen25VL(QwenVL):
    """Adapter of Qwen2.5-VL."""

    model_type: ClassVar[str] = "qwen2_5_vl"
    parts: ClassVar[Mapping[Part, tuple[str, ...]]] = {
        "projector": ("model.visual.merger.",),
        "vision": ("model.visual.",),
        "language_model": ("model.language_model.", "lm_head."),
    }
    lora_targets: ClassVar[tuple[str, ...]] = GATED_LAYERS
    position_rules: ClassVar[tuple[Positions, ...]] = ("preserve", "engine")

    def project(self, model: Any, media: Media, kind: Kind, towers: Sequence[list[Tensor]]) -> list[Features]:
        # The tower sorts patches by attention window, and the model sorts what the merger made of them back.
        vision, grids = self.config.vision_config, media[ENCODER_INPUTS[kind][1]]
        sorted_features = super().project(model, media, kind, towers)
        features: list[Features] = []
        for place, of_one in enumerate(sorted_features):
            grid = grids[place : place + 1]
            order, _ = get_vision_window_index(grid, vision.spatial_merge_size, vision.window_size, vision.patch_size)
            features.append([rows[order.argsort()] for rows in of_one])
        return features

    def position_ids(self, prepared: Prepared) -> Tensor:
        positions = super().position_ids(prepared)
        if self.positions == "engine":
            places = torch.nonzero(prepared.media_mask)[:, 0].split([item.num_tokens for item in prepared.items])
            for item, span in zip(prepared.items, places, strict=True):
                positions[:, span[-1] + 1 :] -= max(item.height - item.width, 0)
        return positions
