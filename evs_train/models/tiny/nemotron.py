"""Tiny checkpoint of Nemotron Omni."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import transformers as hf

from evs_train.models.tiny.common import (
    CONTEXT_LENGTH,
    HIDDEN_SIZE,
    MAX_TOKENS,
    MERGE_SIZE,
    MIN_TOKENS,
    PATCH_SIZE,
    TEMPORAL_PATCH_SIZE,
    TEXT,
    VISION_HIDDEN_SIZE,
    chat_template,
    train_bpe,
    vocabulary,
)

# fmt: off
# `<video>` is left out on purpose: it is no token of the real model either, its processor replaces the string.
NEMOTRON_SPECIAL_TOKENS = [
    "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<image>", "<img>", "</img>",
    "<so_start>", "<so_end>", "<so_embedding>",
]

NEMOTRON_TOKENIZER: dict[str, Any] = {
    "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<unk>",
    "extra_special_tokens": NEMOTRON_SPECIAL_TOKENS, "model_max_length": CONTEXT_LENGTH,
}
NEMOTRON_TEXT: dict[str, Any] = TEXT | {
    "layers_block_type": ["linear_attention", "moe", "linear_attention", "full_attention", "mlp"],
    "ssm_state_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 32, "n_groups": 2, "chunk_size": 64,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN_SIZE // 2,
    "moe_shared_expert_intermediate_size": HIDDEN_SIZE,
}
NEMOTRON_VISION: dict[str, Any] = {
    "hidden_size": VISION_HIDDEN_SIZE, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2.0,
    "patch_size": PATCH_SIZE, "max_img_size": 128, "num_cls_tokens": 2, "num_registers": 2,
    "video_temporal_patch_size": TEMPORAL_PATCH_SIZE,
}
NEMOTRON_PIXELS: dict[str, Any] = {"patch_size": PATCH_SIZE, "downsample_ratio": 1 / MERGE_SIZE}
# fmt: on


def nemotron_h_omni(texts: Iterable[str]) -> tuple[hf.ProcessorMixin, hf.PreTrainedModel]:
    """Nemotron Omni without its audio tower: Mamba, mixture of experts, attention and MLP layers; RADIO vision."""
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(texts, NEMOTRON_SPECIAL_TOKENS),
        **NEMOTRON_TOKENIZER,
    )
    processor = hf.NemotronH_Omni_Reasoning_V3Processor(
        image_processor=hf.NemotronH_Omni_Reasoning_V3ImageProcessor(
            min_num_patches=MIN_TOKENS * MERGE_SIZE**2, max_num_patches=MAX_TOKENS * MERGE_SIZE**2, **NEMOTRON_PIXELS
        ),
        # Every frame is scaled, up or down, to about this many patches: 25 tokens if square, 24 at 16:9.
        video_processor=hf.NemotronH_Omni_Reasoning_V3VideoProcessor(
            video_target_num_patches=100, norm_mean=[0.5, 0.5, 0.5], norm_std=[0.5, 0.5, 0.5], **NEMOTRON_PIXELS
        ),
        tokenizer=tokenizer,
        feature_extractor=hf.ParakeetFeatureExtractor(),  # the processor refuses to be made without one
        video_temporal_patch_dim=TEMPORAL_PATCH_SIZE,
        chat_template=chat_template("<image>", "<video>", "'<think>\\n' if enable_thinking else '<think></think>'"),
    )
    token_id = tokenizer.convert_tokens_to_ids
    config = hf.NemotronH_Omni_Reasoning_V3_Config(
        text_config=NEMOTRON_TEXT | vocabulary(tokenizer, bos="<s>"),
        vision_config=dict(NEMOTRON_VISION),
        audio_config=None,
        downsample_ratio=1 / MERGE_SIZE,
        projector_hidden_size=2 * HIDDEN_SIZE,
        vision_hidden_size=VISION_HIDDEN_SIZE,
        video_temporal_patch_size=TEMPORAL_PATCH_SIZE,
        image_token_id=token_id("<image>"),
        video_token_id=None,  # video frames stand under `<image>` too
        audio_token_id=token_id("<so_embedding>"),
    )
    return processor, hf.NemotronH_Omni_Reasoning_V3(config)
