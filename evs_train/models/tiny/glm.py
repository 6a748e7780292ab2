"""Tiny checkpoints of the GLM families.

GLM's video processor bounds the pixels of a whole clip, not of a frame: units of clips shorter than CLIP_FRAMES may
have more than MAX_TOKENS, units of longer ones, or of small frames, fewer than MIN_TOKENS. The chat template is that of
the other tiny checkpoints, so its `<|im_start|>` and `<|im_end|>` stand beside GLM's own media tokens. Some matrices
are square because the architecture makes them so (`q_proj`, `o_proj`, `merger.proj`).
"""

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
    TOKEN_PIXELS,
    VISION_HIDDEN_SIZE,
    chat_template,
    train_bpe,
    vocabulary,
)

CLIP_FRAMES = 8  # a clip of this length has up to MAX_TOKENS in each unit

# fmt: off
GLM_SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>",
    "<|end_of_video|>", "<|image|>", "<|video|>",
]
GLM_TOKENIZER: dict[str, Any] = {
    "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
    "extra_special_tokens": GLM_SPECIAL_TOKENS, "model_max_length": CONTEXT_LENGTH,
}
GLM_TEXT: dict[str, Any] = {name: value for name, value in TEXT.items() if name != "head_dim"} | {
    "num_hidden_layers": 3,
    "rope_parameters": {
        "rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3],
    },
}
GLM_VISION: dict[str, Any] = {
    "depth": 3, "hidden_size": VISION_HIDDEN_SIZE, "intermediate_size": 3 * VISION_HIDDEN_SIZE, "num_heads": 4,
    "patch_size": PATCH_SIZE, "spatial_merge_size": MERGE_SIZE, "temporal_patch_size": TEMPORAL_PATCH_SIZE,
    "out_hidden_size": HIDDEN_SIZE, "image_size": 12 * PATCH_SIZE,
}
PIXELS: dict[str, Any] = {
    "patch_size": PATCH_SIZE, "merge_size": MERGE_SIZE, "temporal_patch_size": TEMPORAL_PATCH_SIZE,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}
# fmt: on


def _edges(num_frames: int) -> dict[str, int]:
    """Bounds of a clip's pixels: MIN_TOKENS in one unit, MAX_TOKENS in each of `num_frames`. An image is a unit."""
    return {
        "shortest_edge": TEMPORAL_PATCH_SIZE * MIN_TOKENS * TOKEN_PIXELS,
        "longest_edge": num_frames * MAX_TOKENS * TOKEN_PIXELS,
    }


def _tokenizer(texts: Iterable[str]) -> hf.PreTrainedTokenizerBase:
    return hf.PreTrainedTokenizerFast(tokenizer_object=train_bpe(texts, GLM_SPECIAL_TOKENS), **GLM_TOKENIZER)


def _pieces(texts: Iterable[str]) -> dict[str, Any]:
    """What both families' processors are made of, beside their image and video processors."""
    template = chat_template(
        "<|begin_of_image|><|image|><|end_of_image|>", "<|begin_of_video|><|video|><|end_of_video|>", "''"
    )
    return {"tokenizer": _tokenizer(texts), "chat_template": template}


def _config(tokenizer: hf.PreTrainedTokenizerBase) -> dict[str, Any]:
    token_id = tokenizer.convert_tokens_to_ids
    return {
        "text_config": GLM_TEXT | vocabulary(tokenizer, bos="<|endoftext|>"),
        "vision_config": dict(GLM_VISION),
        "image_token_id": token_id("<|image|>"),
        "video_token_id": token_id("<|video|>"),
        "image_start_token_id": token_id("<|begin_of_image|>"),
        "image_end_token_id": token_id("<|end_of_image|>"),
        "video_start_token_id": token_id("<|begin_of_video|>"),
        "video_end_token_id": token_id("<|end_of_video|>"),
    }


def glm4v(texts: Iterable[str]) -> tuple[hf.ProcessorMixin, hf.PreTrainedModel]:
    """GLM-4.1V: m-RoPE on half of each head, a three-layer vision tower with interpolated positions."""
    processor = hf.Glm4vProcessor(
        image_processor=hf.Glm4vImageProcessor(size=_edges(TEMPORAL_PATCH_SIZE), **PIXELS),
        video_processor=hf.Glm4vVideoProcessor(size=_edges(CLIP_FRAMES), **PIXELS),
        **_pieces(texts),
    )
    return processor, hf.Glm4vForConditionalGeneration(hf.Glm4vConfig(**_config(processor.tokenizer)))


def glm46v(texts: Iterable[str]) -> tuple[hf.ProcessorMixin, hf.PreTrainedModel]:
    """GLM-4.6V: as GLM-4.1V, its tower and language model named by their own architectures."""
    processor = hf.Glm46VProcessor(
        image_processor=hf.Glm46VImageProcessor(size=_edges(TEMPORAL_PATCH_SIZE), **PIXELS),
        video_processor=hf.Glm46VVideoProcessor(size=_edges(CLIP_FRAMES), **PIXELS),
        **_pieces(texts),
    )
    return processor, hf.Glm46VForConditionalGeneration(hf.Glm46VConfig(**_config(processor.tokenizer)))
