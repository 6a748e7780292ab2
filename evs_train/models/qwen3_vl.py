"""Qwen3-VL: deepstack features, one separator with a timestamp before each temporal unit (see `qwen_vl.py`).

Text after a video keeps its place, as in vLLM's Qwen3-VL path. Engines score the concatenation of the pooled embeddings
and the deepstack features (vLLM, `Qwen3VLForConditionalGeneration`), and so does `score_tensor`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from evs_train.config import Part
from evs_train.data.chat import Kind, Media
from evs_train.models.base import GATED_LAYERS, Features
from evs_train.models.qwen_vl import QwenVL


class Qwen3VL(QwenVL):
    """Adapter of Qwen3-VL (dense)."""

    model_type: ClassVar[str] = "qwen3_vl"
    parts: ClassVar[Mapping[Part, tuple[str, ...]]] = {
        "projector": ("model.visual.merger.", "model.visual.deepstack_merger_list."),
        "vision": ("model.visual.",),
        "language_model": ("model.language_model.", "lm_head."),
    }
    lora_targets: ClassVar[tuple[str, ...]] = GATED_LAYERS

    def encode(self, model: Any, media: Media, kind: Kind) -> list[Features]:
        out = self._encoded(model, media, kind)
        return [list(layers) for layers in zip(out.pooler_output, *out.deepstack_features, strict=True)]

    def entries(self, model: Any) -> list[nn.Module]:
        return [*super().entries(model), *model.model.visual.deepstack_merger_list]

    def tower_values(self, kind: Kind) -> float:
        return super().tower_values(kind) * (1 + len(self.config.vision_config.deepstack_visual_indexes))

    def feature_values(self) -> int:
        return super().feature_values() * (1 + len(self.config.vision_config.deepstack_visual_indexes))

    def encoder_outputs(self, features: Sequence[tuple[Kind, Features]]) -> dict[str, Any]:
        outputs = {}
        for kind in ("image", "video"):
            of_kind = [item for item_kind, item in features if item_kind == kind]
            if of_kind:
                pooled, *deepstack = zip(*of_kind, strict=True)
                outputs[kind] = BaseModelOutputWithDeepstackFeatures(
                    pooler_output=pooled, deepstack_features=[list(layer) for layer in deepstack]
                )
        return outputs

    def score_tensor(self, features: Features) -> Tensor:
        return torch.cat(features, dim=-1)
