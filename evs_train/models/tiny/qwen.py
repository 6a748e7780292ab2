"""Tiny checkpoints of the Qwen families."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from evs_train.models.tiny.common import (
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
    qwen2_tokenizer,
    vocabulary,
)

# fmt: off
QWEN_SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]
QWEN3_TEXT: dict[str, Any] = TEXT | {
    "num_hidden_layers": 3,
    "rope_parameters": {"rope_theta": 500000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
}
QWEN3_MOE_TEXT: dict[str, Any] = QWEN3_TEXT | {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,  # no square matrices
}
QWEN25_TEXT: dict[str, Any] = {name: value for name, value in TEXT.items() if name != "head_dim"} | {
    "num_hidden_layers": 3,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default", "mrope_section": [4, 6, 6]},
}
# No square matrices: heads are wider than the model, and values than keys.
QWEN35_TEXT: dict[str, Any] = TEXT | {
    "head_dim": 64, "num_key_value_heads": 1,
    "num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_num_value_heads": 4, "linear_value_head_dim": 24,
    "rope_parameters": {
        "rope_theta": 1000000.0, "rope_type": "default", "partial_rotary_factor": 0.25,
        "mrope_section": [3, 3, 2], "mrope_interleaved": True,
    },
}
VISION: dict[str, Any] = {
    "depth": 3, "hidden_size": VISION_HIDDEN_SIZE, "intermediate_size": 2 * VISION_HIDDEN_SIZE, "num_heads": 4,
    "patch_size": PATCH_SIZE, "spatial_merge_size": MERGE_SIZE, "temporal_patch_size": TEMPORAL_PATCH_SIZE,
    "out_hidden_size": HIDDEN_SIZE,
}
QWEN3_VISION: dict[str, Any] = VISION | {"num_position_embeddings": 12 * 12, "deepstack_visual_indexes": [0, 1]}
QWEN35_VISION: dict[str, Any] = VISION | {"num_position_embeddings": 12 * 12}
# Windows of 2 x 2 tokens; the last layer sees whole units.
QWEN25_VISION: dict[str, Any] = VISION | {
    "window_size": 2 * MERGE_SIZE * PATCH_SIZE, "fullatt_block_indexes": [2], "tokens_per_second": 2,
}
PIXELS: dict[str, Any] = {
    "patch_size": PATCH_SIZE, "merge_size": MERGE_SIZE, "temporal_patch_size": TEMPORAL_PATCH_SIZE,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}
EDGES = {"shortest_edge": MIN_TOKENS * TOKEN_PIXELS, "longest_edge": MAX_TOKENS * TOKEN_PIXELS}
# fmt: on

Tiny = tuple[hf.ProcessorMixin, hf.PreTrainedModel]


def _qwen3_processor(texts: Iterable[str], tokenizer: type = hf.Qwen2Tokenizer) -> hf.ProcessorMixin:
    return hf.Qwen3VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(size=EDGES, **PIXELS),
        tokenizer=qwen2_tokenizer(texts, QWEN_SPECIAL_TOKENS, tokenizer),
        # A video's "edges" are pixels of the whole clip. The cap bounds each frame however many there are; from 128
        # frames on the clip's budget takes over and thins a frame to about MIN_TOKENS.
        video_processor=hf.Qwen3VLVideoProcessor(
            size=EDGES | {"longest_edge": 128 * EDGES["longest_edge"]},
            cap_pixels_per_frame=True,
            max_video_tokens=MAX_TOKENS,
            **PIXELS,
        ),
        chat_template=_chat_template(),
    )


def _chat_template() -> str:
    return chat_template(
        "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>", "''"
    )


def _special_ids(tokenizer: hf.PreTrainedTokenizerBase) -> dict[str, int]:
    token_id = tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": token_id("<|image_pad|>"),
        "video_token_id": token_id("<|video_pad|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
    }


def qwen3_vl(texts: Iterable[str]) -> Tiny:
    """Qwen3-VL: interleaved m-RoPE, a three-layer vision tower with deepstack from the first two layers."""
    processor = _qwen3_processor(texts)
    config = hf.Qwen3VLConfig(
        text_config=QWEN3_TEXT | vocabulary(processor.tokenizer, bos="<|endoftext|>"),
        vision_config=dict(QWEN3_VISION),
        **_special_ids(processor.tokenizer),
    )
    return processor, hf.Qwen3VLForConditionalGeneration(config)


def qwen3_vl_moe(texts: Iterable[str]) -> Tiny:
    """Qwen3-VL-MoE: as Qwen3-VL, with four experts in every layer, two of them active."""
    processor = _qwen3_processor(texts)
    config = hf.Qwen3VLMoeConfig(
        text_config=QWEN3_MOE_TEXT | vocabulary(processor.tokenizer, bos="<|endoftext|>"),
        vision_config=dict(QWEN3_VISION),
        **_special_ids(processor.tokenizer),
    )
    return processor, hf.Qwen3VLMoeForConditionalGeneration(config)


def turn_experts(directory: Path) -> None:
    """Write the experts as the released Qwen3-VL-MoE has them, inputs first; transformers saves the reverse."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if ".experts." in name:
            tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def released_names(directory: Path) -> None:
    """Write the tensors under the names of the released Qwen2.5-VL, which is older than transformers' own names."""
    file = directory / "model.safetensors"
    tensors = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})


def qwen2_5_vl(texts: Iterable[str]) -> Tiny:
    """Qwen2.5-VL: m-RoPE in three sections, a three-layer vision tower with window attention in the first two."""
    tokenizer = qwen2_tokenizer(texts, QWEN_SPECIAL_TOKENS)
    processor = hf.Qwen2_5_VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(size=EDGES, **PIXELS),
        tokenizer=tokenizer,
        video_processor=hf.Qwen2VLVideoProcessor(size=EDGES, cap_pixels_per_frame=False, **PIXELS),
        chat_template=_chat_template(),
    )
    config = hf.Qwen2_5_VLConfig(
        text_config=QWEN25_TEXT | vocabulary(tokenizer, bos="<|endoftext|>"),
        vision_config=dict(QWEN25_VISION),
        **_special_ids(tokenizer),
    )
    return processor, hf.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_5(texts: Iterable[str]) -> Tiny:
    """Qwen3.5: gated DeltaNet layers round one of gated attention, no deepstack."""
    processor = _qwen3_processor(texts, hf.Qwen3_5Tokenizer)
    config = hf.Qwen3_5Config(
        text_config=QWEN35_TEXT | vocabulary(processor.tokenizer, bos="<|endoftext|>"),
        vision_config=dict(QWEN35_VISION),
        **_special_ids(processor.tokenizer),
    )
    return processor, hf.Qwen3_5ForConditionalGeneration(config)


def add_draft_head(directory: Path) -> None:
    """Add some tensors of the released Qwen3.5's draft head, which transformers neither loads nor saves."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    dtype = tensors["model.language_model.norm.weight"].dtype
    values = torch.arange(2 * HIDDEN_SIZE**2, dtype=dtype).view(HIDDEN_SIZE, 2 * HIDDEN_SIZE) / HIDDEN_SIZE**2
    tensors["mtp.fc.weight"] = values
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "layers.0.input_layernorm", "norm"):
        tensors[f"mtp.{name}.weight"] = values[0, :HIDDEN_SIZE].clone()
    save_file(tensors, file, metadata={"format": "pt"})
