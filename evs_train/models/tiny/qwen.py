"""Tiny checkpoints of the Qwen families."""

from __future__ import annotations

import json
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
    TOKEN_PIXELS,
    VISION_HIDDEN_SIZE,
    chat_template,
    train_bpe,
    vocabulary,
)

# fmt: off
QWEN_SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]
QWEN_TOKENIZER: dict[str, Any] = {
    "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
    "extra_special_tokens": QWEN_SPECIAL_TOKENS, "model_max_length": CONTEXT_LENGTH,
}
QWEN_TEXT: dict[str, Any] = TEXT | {
    "num_hidden_layers": 3,
    "rope_parameters": {"rope_theta": 500000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
}
QWEN_VISION: dict[str, Any] = {
    "depth": 3, "hidden_size": VISION_HIDDEN_SIZE, "intermediate_size": 2 * VISION_HIDDEN_SIZE, "num_heads": 4,
    "patch_size": PATCH_SIZE, "spatial_merge_size": MERGE_SIZE, "temporal_patch_size": TEMPORAL_PATCH_SIZE,
    "out_hidden_size": HIDDEN_SIZE, "num_position_embeddings": 12 * 12, "deepstack_visual_indexes": [0, 1],
}
QWEN_PIXELS: dict[str, Any] = {
    "patch_size": PATCH_SIZE, "merge_size": MERGE_SIZE, "temporal_patch_size": TEMPORAL_PATCH_SIZE,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}
# fmt: on


def qwen3_vl(texts: Iterable[str]) -> tuple[hf.ProcessorMixin, hf.PreTrainedModel]:
    """Qwen3-VL: interleaved m-RoPE, a three-layer vision tower with deepstack from the first two layers."""
    bpe = json.loads(train_bpe(texts, []).to_str())["model"]
    tokenizer = hf.Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(pair) for pair in bpe["merges"]],
        **QWEN_TOKENIZER,
    )
    pixels = {"shortest_edge": MIN_TOKENS * TOKEN_PIXELS, "longest_edge": MAX_TOKENS * TOKEN_PIXELS}
    processor = hf.Qwen3VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(size=pixels, **QWEN_PIXELS),
        tokenizer=tokenizer,
        # A video's "edges" are pixels of the whole clip. The cap bounds each frame however many there are; from 128
        # frames on the clip's budget takes over and thins a frame to about MIN_TOKENS.
        video_processor=hf.Qwen3VLVideoProcessor(
            size=pixels | {"longest_edge": 128 * pixels["longest_edge"]},
            cap_pixels_per_frame=True,
            max_video_tokens=MAX_TOKENS,
            **QWEN_PIXELS,
        ),
        chat_template=chat_template(
            "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>", "''"
        ),
    )
    token_id = tokenizer.convert_tokens_to_ids
    config = hf.Qwen3VLConfig(
        text_config=QWEN_TEXT | vocabulary(tokenizer, bos="<|endoftext|>"),
        vision_config=dict(QWEN_VISION),
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )
    return processor, hf.Qwen3VLForConditionalGeneration(config)
