"""Qwen3.5: Qwen3-VL's processor and tower without deepstack; three of four layers are gated DeltaNet (recurrent).

Time is in the text, as in Qwen3-VL: a timestamp before each unit, which stays even if its unit keeps no token. The
recurrent layers read what is left of the sequence as if nothing had been there: dropping a token is not masking it.
Right padding cannot reach earlier tokens. Without flash-linear-attention and causal-conv1d these layers run in plain
PyTorch (in float32, in chunks of 64 tokens, the last one padded): correct and slow.

Adapters reach every linear layer, the gates of the recurrence (`in_proj_a`, `in_proj_b`) included: transformers calls
them all as modules. A kernel from the hub may replace a whole layer and read the weights by itself, but only if asked
for (`use_kernels=True`), which `loading.py` does not. The convolution, `A_log` and `dt_bias` get no adapter.

Checkpoints carry a draft head (`mtp.*`) that transformers does not load. It is not trained; the export passes it on.

What this family cannot do: packing (its recurrent layers know no document boundaries without those two packages).
Engines score the pooled embeddings (vLLM: the class is Qwen3-VL's, with no deepstack levels).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from evs_train.config import Part
from evs_train.models.qwen_vl import QwenVL


class Qwen35(QwenVL):
    """Adapter of Qwen3.5 (dense)."""

    model_type: ClassVar[str] = "qwen3_5"
    parts: ClassVar[Mapping[Part, tuple[str, ...]]] = {
        "projector": ("model.visual.merger.",),
        "vision": ("model.visual.",),
        "language_model": ("model.language_model.", "lm_head."),
    }
    lora_targets: ClassVar[tuple[str, ...]] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj",
    )  # fmt: skip
    attention_only: ClassVar[bool] = False
