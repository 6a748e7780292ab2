"""Models of the benchmarks: architectures by their sizes, with random weights and a processor that fits.

Sizes of released models were read in public copies of their config.json: Qwen3-VL 2B and 8B in converters' tests that
pin them, Nemotron 3 Nano Omni in published notes on its quantization and in tests of NVIDIA's text model of the same
sizes; RADIO's are the defaults of transformers' RadioConfig, as `models/nemotron_release.py` says. Counted on the meta
device they have 2.13, 8.77 and 32.4 billion parameters. The tokenizer is that of the tiny checkpoints, so prompts have
somewhat more tokens than with the released one; the head has the released vocabulary.

Cost: a folder of about 1 MB without weights; those are made on the device (`runs.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evs_train.models.tiny import TINY_FAMILIES

# fmt: off
QWEN3_VL_2B: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 262144,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True},
}
QWEN3_VL_2B_VISION: dict[str, Any] = {
    "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "patch_size": 16,
    "out_hidden_size": 2048, "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17],
}
QWEN3_VL_8B: dict[str, Any] = QWEN3_VL_2B | {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
QWEN3_VL_8B_VISION: dict[str, Any] = QWEN3_VL_2B_VISION | {
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 4096,
    "deepstack_visual_indexes": [8, 16, 24],
}
LAYERS = {"M": "linear_attention", "E": "moe", "*": "full_attention"}
NEMOTRON_PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
NEMOTRON: dict[str, Any] = {
    "hidden_size": 2688, "intermediate_size": 1856, "num_attention_heads": 32, "num_key_value_heads": 2,
    "head_dim": 128, "vocab_size": 131072, "max_position_embeddings": 262144,
    "mamba_num_heads": 64, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4,
    "chunk_size": 128, "n_routed_experts": 128, "num_experts_per_tok": 6, "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712, "tie_word_embeddings": False,
}
RADIO: dict[str, Any] = {
    "hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "mlp_ratio": 4.0, "patch_size": 16,
    "max_img_size": 2048, "num_cls_tokens": 3, "num_registers": 7, "video_temporal_patch_size": 2,
}
# A language model that outweighs its small tower, as in the released ones, at a size for two cores.
SMALL: dict[str, Any] = {
    "hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 8192,
    "rope_parameters": {"rope_theta": 5e6, "mrope_section": [12, 10, 10], "mrope_interleaved": True},
}
SMALL_VISION: dict[str, Any] = {"depth": 3, "hidden_size": 64, "out_hidden_size": 384}
# Narrow, so that the part of attention that grows with the square of the length shows at lengths that a CPU reaches.
NARROW: dict[str, Any] = SMALL | {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
NARROW_VISION: dict[str, Any] = SMALL_VISION | {"out_hidden_size": 128}
# Qwen3-VL 2B in small: the head has 22 % of the weights of the layers, as there, and the frozen tower has a quarter of
# the operations of a dense step at 24 frames of 160 pixels (24 % at 32 frames; there 23 % at 64 frames of 448).
IN_SMALL: dict[str, Any] = SMALL | {"vocab_size": 6144, "tie_word_embeddings": True}
IN_SMALL_VISION: dict[str, Any] = SMALL_VISION | {"hidden_size": 192, "intermediate_size": 768}
# fmt: on


@dataclass(frozen=True)
class Shape:
    """A model's sizes and those of its video.

    Attributes:
        name: for tables.
        family: key of `TINY_FAMILIES`; what `text` and `vision` leave out is as in the tiny checkpoint.
        side: pixels of a square frame; a multiple of what one token covers.
        patch: pixels of a patch's side.
        top: fields of the configuration beside those of text and vision.
    """

    name: str
    family: str = "qwen3_vl"
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    side: int = 64
    patch: int = 8
    top: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_unit(self) -> int:
        """Of one temporal unit, after 2 x 2 patches are merged."""
        return (self.side // (2 * self.patch)) ** 2


def nemotron(num_layers: int) -> Shape:
    """Nemotron Omni with the first `num_layers` layers of its language model."""
    kinds = [LAYERS[symbol] for symbol in NEMOTRON_PATTERN[:num_layers]]
    text = NEMOTRON | {"layers_block_type": kinds, "num_hidden_layers": num_layers}
    top = {"projector_hidden_size": 20480, "vision_hidden_size": 1280}
    cut = "" if num_layers == len(NEMOTRON_PATTERN) else f", {num_layers} of {len(NEMOTRON_PATTERN)} layers"
    return Shape(f"Nemotron Omni{cut}", "nemotron_h_omni", text, RADIO, side=512, patch=16, top=top)


def qwen3_vl_8b(num_layers: int = 36) -> Shape:
    """Qwen3-VL 8B, or its first `num_layers` layers."""
    name = "Qwen3-VL 8B" if num_layers == 36 else f"Qwen3-VL 8B, {num_layers} of 36 layers"
    return Shape(name, "qwen3_vl", QWEN3_VL_8B | {"num_hidden_layers": num_layers}, QWEN3_VL_8B_VISION, 448, 16)


TOY = Shape("tiny Qwen3-VL")
TOY_NEMOTRON = Shape("tiny Nemotron Omni", "nemotron_h_omni", side=80)
CPU = Shape("small Qwen3-VL", "qwen3_vl", SMALL, SMALL_VISION, side=128)
CPU_NARROW = Shape("narrow Qwen3-VL", "qwen3_vl", NARROW, NARROW_VISION, side=96)
CPU_2B = Shape("Qwen3-VL 2B in small", "qwen3_vl", IN_SMALL, IN_SMALL_VISION, side=160)
QWEN_2B = Shape("Qwen3-VL 2B", "qwen3_vl", QWEN3_VL_2B, QWEN3_VL_2B_VISION, 448, 16)


def write_checkpoint(shape: Shape, folder: Path) -> Path:
    """Configuration and processor of a model, without weights; returns `folder`."""
    processor, model = TINY_FAMILIES[shape.family](())
    config = model.config
    sizes = {"text_config": shape.text, "vision_config": shape.vision}
    changed: dict[str, Any] = {name: getattr(config, name).to_dict() | more for name, more in sizes.items()}
    tied = shape.text.get("tie_word_embeddings", False)
    config = type(config)(**(config.to_dict() | changed | shape.top | {"tie_word_embeddings": tied}))
    config.save_pretrained(folder)
    _fit(processor, shape)
    processor.save_pretrained(folder)
    return folder


def _fit(processor: Any, shape: Shape) -> None:
    """Let the processor leave frames of `shape.side` as they are, however many there are."""
    for part in (processor.image_processor, processor.video_processor):
        part.patch_size = shape.patch
    if shape.family == "nemotron_h_omni":
        processor.video_processor.video_target_num_patches = (shape.side // shape.patch) ** 2
        return
    processor.video_processor.size = {"shortest_edge": shape.side**2, "longest_edge": 4096 * shape.side**2}
    processor.video_processor.max_video_tokens = 2 * shape.tokens_per_unit
