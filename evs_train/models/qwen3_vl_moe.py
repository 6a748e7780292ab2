"""Qwen3-VL with a mixture of experts: the vision tower, positions and features of Qwen3-VL, another language model.

transformers holds a layer's experts in two tensors, (experts, 2 * intermediate, hidden) and (experts, hidden,
intermediate), and its router in a plain parameter. None of them is a linear layer, so LoRA reaches attention only;
`tuning.method: full` trains experts and router as well. The router's balancing loss is off, as in the model's config.
"""

from __future__ import annotations

from typing import ClassVar

from evs_train.models.base import NO_ADAPTER_ON_EXPERTS
from evs_train.models.qwen3_vl import Qwen3VL


class Qwen3VLMoe(Qwen3VL):
    """Adapter of Qwen3-VL-MoE, such as 30B-A3B."""

    model_type: ClassVar[str] = "qwen3_vl_moe"
    lora_targets: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "o_proj")
    lora_note: ClassVar[str] = NO_ADAPTER_ON_EXPERTS
