"""The proof's model before any training: a Qwen3-VL with random weights that sees 32 x 32 pixels as 16 tokens a unit.

It is the tiny checkpoint of `evs_train.models.tiny` without the merging of 2 x 2 patches, so that a token is a patch of
8 x 8 pixels (a quarter of the patches to encode), and with a tokenizer for which each choice of the world is one token.
Cost: two seconds and 3 MB.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf

from benchmarks.proof import world
from evs_train.models.tiny import qwen

PATCH = 8
TOKENS_PER_UNIT = (world.SIDE // PATCH) ** 2
INITIALIZER_RANGE = 0.07  # near the root of 1 / width: with the 0.02 of wide models this one learns far later
POSITION_RANGE = 0.5  # of places in a picture: near the size of embedded patches, so that a place can be told
_WIDTHS = {
    "text_config": ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    "vision_config": ("hidden_size", "intermediate_size", "num_heads", "out_hidden_size"),
}


def build_base(folder: Path, seed: int = 0, width: int = 1) -> Path:
    """Write processor and random weights into `folder`, unless they are there; returns it.

    Args:
        width: heads of the encoder and of the language model, and with them all their widths, are multiplied by it.
    """
    if (folder / "model.safetensors").is_file():
        return folder
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        processor, model = qwen.qwen3_vl(100 * world.texts())
        for part in (processor.image_processor, processor.video_processor):
            part.patch_size, part.merge_size = PATCH, 1
            part.size = {"shortest_edge": world.SIDE**2, "longest_edge": world.NUM_FRAMES * world.SIDE**2}
        processor.video_processor.max_video_tokens = TOKENS_PER_UNIT
        config = model.config
        config.vision_config.patch_size, config.vision_config.spatial_merge_size = PATCH, 1
        config.vision_config.num_position_embeddings = TOKENS_PER_UNIT
        for part in (config, config.text_config, config.vision_config):
            part.initializer_range = INITIALIZER_RANGE / width**0.5
        for part, names in _WIDTHS.items():
            for name in names:
                setattr(getattr(config, part), name, width * getattr(getattr(config, part), name))
        model = hf.Qwen3VLForConditionalGeneration(config)
        torch.nn.init.normal_(model.model.visual.pos_embed.weight, std=POSITION_RANGE)
    ids = config.get_text_config()
    model.generation_config = hf.GenerationConfig(
        bos_token_id=ids.bos_token_id, eos_token_id=ids.eos_token_id, pad_token_id=ids.pad_token_id
    )
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder
