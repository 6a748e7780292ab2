"""Tiny checkpoint of VideoLLaMA 3."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import transformers as hf

from evs_train.models.tiny.common import (
    MAX_TOKENS,
    MERGE_SIZE,
    MIN_TOKENS,
    PATCH_SIZE,
    QWEN2_TEXT,
    TOKEN_PIXELS,
    VISION_HIDDEN_SIZE,
    chat_template,
    qwen2_tokenizer,
    vocabulary,
)

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>"]
# The budget of a clip in frames of MAX_TOKENS: the processor knows no limit of its own for a frame.
BUDGET_FRAMES = 8
# fmt: off
PIXELS: dict[str, Any] = {
    "patch_size": PATCH_SIZE, "temporal_patch_size": 1, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}
VISION: dict[str, Any] = {
    "hidden_size": VISION_HIDDEN_SIZE, "intermediate_size": 2 * VISION_HIDDEN_SIZE, "num_hidden_layers": 2,
    "num_attention_heads": 4, "patch_size": PATCH_SIZE,
}
# fmt: on


def video_llama_3(texts: Iterable[str]) -> tuple[hf.ProcessorMixin, hf.PreTrainedModel]:
    """VideoLLaMA 3: patches of a video merged 2 x 2, those of an image not; token compression on, as released."""
    tokenizer = qwen2_tokenizer(texts, SPECIAL_TOKENS)
    of_image = {"shortest_edge": MIN_TOKENS * PATCH_SIZE**2, "longest_edge": MAX_TOKENS * PATCH_SIZE**2}
    of_clip = {"shortest_edge": MIN_TOKENS * TOKEN_PIXELS, "longest_edge": BUDGET_FRAMES * MAX_TOKENS * TOKEN_PIXELS}
    processor = hf.VideoLlama3Processor(
        image_processor=hf.VideoLlama3ImageProcessor(size=of_image, merge_size=1, **PIXELS),
        tokenizer=tokenizer,
        video_processor=hf.VideoLlama3VideoProcessor(size=of_clip, merge_size=MERGE_SIZE, **PIXELS),
        chat_template=chat_template("<|image_pad|>", "<|video_pad|>", "''"),
    )
    config = hf.VideoLlama3Config(
        text_config=QWEN2_TEXT | vocabulary(tokenizer, bos="<|endoftext|>"),
        vision_config=dict(VISION),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )
    return processor, hf.VideoLlama3ForConditionalGeneration(config)
