"""Tiny checkpoint of LLaVA-OneVision."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers as hf
from safetensors.torch import load_file, save_file

from evs_train.models.tiny.common import (
    PATCH_SIZE,
    QWEN2_TEXT,
    VISION_HIDDEN_SIZE,
    chat_template,
    qwen2_tokenizer,
    vocabulary,
)

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
# As in the release (384 and 14), the side is no multiple of the patch, and its 7 patches are an odd number to pool.
IMAGE_SIZE = 60
PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
PINPOINTS = [[rows * IMAGE_SIZE, columns * IMAGE_SIZE] for rows in (1, 2) for columns in (1, 2)]
# fmt: off
PIXELS: dict[str, Any] = {
    "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}
VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model", "hidden_size": VISION_HIDDEN_SIZE,
    "intermediate_size": 2 * VISION_HIDDEN_SIZE, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "vision_use_head": False,
}
# fmt: on


def llava_onevision(texts: Iterable[str]) -> tuple[hf.ProcessorMixin, hf.PreTrainedModel]:
    """LLaVA-OneVision: 16 tokens per frame and a newline per video; images of up to four tiles beside the whole."""
    tokenizer = qwen2_tokenizer(texts, SPECIAL_TOKENS)
    processor = hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(image_grid_pinpoints=PINPOINTS, **PIXELS),
        tokenizer=tokenizer,
        video_processor=hf.LlavaOnevisionVideoProcessor(**PIXELS),
        num_image_tokens=PATCHES,
        vision_feature_select_strategy="full",
        chat_template=chat_template("<image>", "<video>", "''"),
    )
    config = hf.LlavaOnevisionConfig(
        text_config=QWEN2_TEXT | vocabulary(tokenizer, bos="<|endoftext|>"),
        vision_config=dict(VISION),
        image_grid_pinpoints=PINPOINTS,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
    )
    return processor, hf.LlavaOnevisionForConditionalGeneration(config)


def released_names(directory: Path) -> None:
    """Write the tower's tensors under the names of the releases, which had one more module round it."""
    file = directory / "model.safetensors"
    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
