"""Tiny checkpoint of InternVL 3 in transformers' format."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers as hf

from evs_train.models.tiny.common import (
    CONTEXT_LENGTH,
    MERGE_SIZE,
    PATCH_SIZE,
    TEXT,
    VISION_HIDDEN_SIZE,
    chat_template,
    train_bpe,
    vocabulary,
)

TILE_SIZE = 8 * PATCH_SIZE  # 4 x 4 tokens
TOKENS_PER_TILE = (TILE_SIZE // PATCH_SIZE // MERGE_SIZE) ** 2

# fmt: off
INTERNVL_NAMED_TOKENS = {  # the names that transformers' processor asks the tokenizer for
    "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
INTERNVL_SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", *INTERNVL_NAMED_TOKENS.values(), "<quad>", "</quad>", "<ref>",
    "</ref>", "<box>", "</box>",
]
INTERNVL_TOKENIZER: dict[str, Any] = {
    "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "extra_special_tokens": INTERNVL_SPECIAL_TOKENS,
    "model_specific_special_tokens": INTERNVL_NAMED_TOKENS, "model_max_length": CONTEXT_LENGTH,
}
INTERNVL_TEXT: dict[str, Any] = {name: value for name, value in TEXT.items() if name != "head_dim"} | {
    "model_type": "qwen2", "num_hidden_layers": 3,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "dynamic", "factor": 2.0},
}
INTERNVL_VISION: dict[str, Any] = {
    "hidden_size": VISION_HIDDEN_SIZE, "intermediate_size": 2 * VISION_HIDDEN_SIZE, "num_hidden_layers": 3,
    "num_attention_heads": 4, "attention_bias": True, "image_size": TILE_SIZE, "patch_size": PATCH_SIZE,
}
PIXELS: dict[str, Any] = {
    "size": {"height": TILE_SIZE, "width": TILE_SIZE}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}
# fmt: on


def internvl(texts: Iterable[str]) -> tuple[hf.ProcessorMixin, hf.PreTrainedModel]:
    """InternVL 3 over Qwen2: tiles of 16 tokens, an image in up to four of them and a thumbnail."""
    bpe = json.loads(train_bpe(texts, []).to_str())["model"]
    tokenizer = hf.Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(pair) for pair in bpe["merges"]],
        **INTERNVL_TOKENIZER,
    )
    processor = hf.InternVLProcessor(
        image_processor=hf.GotOcr2ImageProcessor(max_patches=4, **PIXELS),
        tokenizer=tokenizer,
        video_processor=hf.InternVLVideoProcessor(**PIXELS),
        image_seq_length=TOKENS_PER_TILE,
        chat_template=chat_template("<IMG_CONTEXT>\\n", "<video>\\n", "''"),
    )
    config = hf.InternVLConfig(
        text_config=INTERNVL_TEXT | vocabulary(tokenizer, bos="<|endoftext|>"),
        vision_config=dict(INTERNVL_VISION),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=TOKENS_PER_TILE,
        downsample_ratio=1 / MERGE_SIZE,
        tie_word_embeddings=False,
    )
    return processor, hf.InternVLForConditionalGeneration(config)


def released_config(directory: Path) -> None:
    """Leave out of config.json what the releases do: whether the head is tied (it is not)."""
    file = directory / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    del config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
