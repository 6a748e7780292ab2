"""GLM-4.1V: one placeholder for images and videos, a timestamp behind each unit, m-RoPE in three sections.

A video is `<|begin_of_video|>`, its units, `<|end_of_video|>`; a unit is `<|begin_of_image|>`, its tokens,
`<|end_of_image|>` and the time of its first frame. All text stays, even round a unit that kept no token. For the
positions each unit is a grid of its own: its temporal position is the place of its text, and what follows goes on
behind the larger side of the grid. Seconds are in the text only.

The processor computes a time as index / fps of every second frame and writes whole seconds (GLM-4.6V's: tenths). A
wrong rate writes wrong times, and nothing else shows it; without metadata it assumes 24. Whole seconds keep units apart
up to two frames per second (`data.fps: 2`); at more, neighbours get the same time.

Features of both kinds are scattered to the same places, so they travel as one sequence in reading order. Thus images
beside videos can be trained on, where the forward of transformers 5.23 fails: it wants each kind to fill all places.

GLM-4.6V-Flash comes with this architecture and GLM-4.6V's processor (read: zai-org/GLM-V issue 220; runs that log the
processor's class). The downsampling convolution, which takes the tower's width to the language model's, belongs to the
projector. The gate and up layers of an MLP are one (`gate_up_proj`). No engine was found that prunes this family.

The release's template (read: as quoted in SGLang's tests) writes nothing behind an answer, and generation stops at the
next `<|user|>`; so that token ends every answer here, the last one included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from evs_train.config import Part
from evs_train.data.chat import Kind
from evs_train.models.base import Features
from evs_train.models.qwen_vl import QwenVL


class Glm4v(QwenVL):
    """Adapter of GLM-4.1V and of GLM-4.6V-Flash, whose release names this architecture."""

    model_type: ClassVar[str] = "glm4v"
    parts: ClassVar[Mapping[Part, tuple[str, ...]]] = {
        "projector": ("model.visual.downsample.", "model.visual.merger."),
        "vision": ("model.visual.",),
        "language_model": ("model.language_model.", "lm_head."),
    }
    end_of_turn: ClassVar[str] = "<|user|>"
    lora_targets: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")

    projector_entries: ClassVar[tuple[str, ...]] = ("model.visual.downsample",)

    def projected(self, model: Any, number: int, outputs: Tensor) -> Tensor:
        rows: Tensor = model.model.visual.merger(super().projected(model, number, outputs).flatten(1))
        return rows

    def encoder_outputs(self, features: Sequence[tuple[Kind, Features]]) -> dict[str, Any]:
        if not features:
            return {}
        return {"video": BaseModelOutputWithPooling(pooler_output=tuple(item[0] for _, item in features))}
