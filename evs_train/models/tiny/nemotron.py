"""Tiny checkpoint of Nemotron Omni, in the layout of NVIDIA's release (see `evs_train/models/nemotron_release.py`)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

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
# The audio tower, which the files have and nothing here runs. `model_type` is none of transformers', as released.
NEMOTRON_SOUND: dict[str, Any] = {
    "model_type": "parakeet", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "convolution_bias": False, "conv_kernel_size": 3, "subsampling_factor": 8,
    "subsampling_conv_channels": 4, "subsampling_conv_kernel_size": 3, "subsampling_conv_stride": 2,
    "num_mel_bins": 16, "projection_hidden_size": 24, "projection_bias": False, "sampling_rate": 16000,
}
RELEASE = "NemotronH_Nano_Omni_Reasoning_V3"
RELEASED_FIELDS = {
    "text_config": "llm_config", "image_token_id": "img_context_token_id", "audio_token_id": "sound_context_token_id",
    "vision_hidden_size": "vit_hidden_size",
}
NEMOTRON_PIXELS: dict[str, Any] = {"patch_size": PATCH_SIZE, "downsample_ratio": 1 / MERGE_SIZE}
# fmt: on


def nemotron_h_omni(texts: Iterable[str]) -> tuple[hf.ProcessorMixin, hf.PreTrainedModel]:
    """Nemotron Omni: Mamba, mixture of experts, attention and MLP layers; RADIO vision. Audio: `released_format`."""
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


def released_format(directory: Path) -> None:
    """Rewrite what transformers saved as the release has it: config, processor, tensors, and code that must not run.

    transformers saves the tensors that it has under NVIDIA's names already. Not stored there are `lambda1` and
    `summary_idxs`; added are tensors that it does not load and those of the audio tower.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    processor = json.loads((directory / "processor_config.json").read_text(encoding="utf-8"))
    (directory / "processor_config.json").unlink()
    _write_json(directory / "config.json", _released_config(config, processor["video_processor"]))
    of_videos = ("norm_mean", "norm_std")  # with `image_mean` beside it, which the release has not, frames' alone
    _write_json(
        directory / "preprocessor_config.json",
        {name: value for name, value in processor["image_processor"].items() if name != "image_processor_type"}
        | {name: processor["video_processor"][name] for name in of_videos}
        | {
            "auto_map": {"AutoImageProcessor": f"image_processing.{RELEASE}ImageProcessor"},
            "image_processor_type": f"{RELEASE}ImageProcessor",
        },
    )
    for name in ("configuration", "modeling", "image_processing"):
        code = 'raise RuntimeError("code of the checkpoint was run")\n'
        (directory / f"{name}.py").write_text(code, encoding="utf-8")
    file = directory / "model.safetensors"
    tensors = {n: t for n, t in load_file(file).items() if not n.endswith((".lambda1", ".summary_idxs"))}
    for name in ("norm_mean", "norm_std"):
        tensors[f"vision_model.radio_model.input_conditioner.{name}"] = torch.full((3, 1, 1), 0.5)
    save_file(tensors | _sound_tensors(tensors["mlp1.3.weight"].dtype), file, metadata={"format": "pt"})


def _released_config(config: dict[str, Any], of_videos: dict[str, Any]) -> dict[str, Any]:
    """The fields of config.json by NVIDIA's names; the tower's sizes, which the release leaves out, stay."""
    left_out = ("audio_config", "video_temporal_patch_size", "video_token_id", "dtype")  # the second: `vision_config`
    fields = {RELEASED_FIELDS.get(name, name): value for name, value in config.items() if name not in left_out}
    text, vision = fields["llm_config"], fields["vision_config"]
    symbols = {"linear_attention": "M", "moe": "E", "full_attention": "*", "mlp": "-"}
    text["hybrid_override_pattern"] = "".join(symbols[layer] for layer in text.pop("layers_block_type"))
    text |= {"num_hidden_layers": len(text["hybrid_override_pattern"]), "architectures": ["NemotronHForCausalLM"]}
    vision |= {name: of_videos[name] for name in ("video_target_num_patches", "video_maintain_aspect_ratio")}
    vision |= {"model_type": "", "args": {"model": "vit_huge_patch16_224"}, "separate_video_embedder": True}
    return fields | {
        "architectures": [RELEASE],
        "model_type": RELEASE,
        "auto_map": {"AutoConfig": f"configuration.{RELEASE}_Config", "AutoModel": f"modeling.{RELEASE}"},
        "video_context_token_id": text["vocab_size"] + 9,  # no token of the tokenizer, as in the release
        "sound_config": NEMOTRON_SOUND,
        "torch_dtype": config["dtype"],
    }


def _sound_tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The audio tower's tensors by NVIDIA's names; torch's global random state is left as it was."""
    sizes = {name: value for name, value in NEMOTRON_SOUND.items() if name != "model_type"}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        tower = hf.AutoModel.from_config(
            hf.ParakeetEncoderConfig(**sizes, attention_bias=False, scale_input=False), dtype=dtype
        )
        made = {
            "norm": torch.ones(NEMOTRON_SOUND["hidden_size"], dtype=dtype),
            "linear1": torch.randn(
                NEMOTRON_SOUND["projection_hidden_size"], NEMOTRON_SOUND["hidden_size"], dtype=dtype
            ),
            "linear2": torch.randn(HIDDEN_SIZE, NEMOTRON_SOUND["projection_hidden_size"], dtype=dtype),
        }
    return (
        {f"sound_encoder.encoder.{name}": tensor for name, tensor in tower.state_dict().items()}
        | {f"sound_projection.{name}.weight": tensor for name, tensor in made.items()}
        | {
            "sound_encoder.encoder.feature_extractor.featurizer.fb": torch.linspace(0, 1, 16 * 5).view(1, 16, 5),
            "sound_encoder.encoder.feature_extractor.featurizer.window": torch.hann_window(400),
        }
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
