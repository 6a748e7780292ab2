"""NVIDIA's layout of Nemotron 3 Nano Omni: read by transformers' classes alone, and written as it was read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    NemotronH_Omni_Reasoning_V3,
    NemotronH_Omni_Reasoning_V3_Config,
    NemotronH_Omni_Reasoning_V3Processor,
)
from transformers.core_model_loading import revert_weight_conversion

from evs_train.config import ModelSection
from evs_train.data.video import FrameSampling, read_video
from evs_train.data_config import DataSection
from evs_train.export import export_run
from evs_train.models.loading import load_config, load_family, load_weights, without_weights
from evs_train.models.nemotron_h_omni import NemotronHOmni
from evs_train.models.nemotron_release import read_config
from evs_train.models.tiny import TINY_FAMILIES
from evs_train.models.tuning import part_of
from evs_train.uptrain import Run
from tests.runs import arguments, recipe_of

RELEASE = "NemotronH_Nano_Omni_Reasoning_V3"
# What was read of the released config.json; the tower's sizes are not in it.
FIELDS: dict[str, Any] = {
    "architectures": [RELEASE],
    "model_type": RELEASE,
    "auto_map": {"AutoConfig": f"configuration.{RELEASE}_Config"},
    "torch_dtype": "bfloat16",
    "downsample_ratio": 0.5,
    "force_image_size": 512,
    "patch_size": 16,
    "ps_version": "v2",
    "use_thumbnail": True,
    "max_sequence_length": 131072,
    "img_context_token": "<image>",
    "img_context_token_id": 18,
    "video_context_token_id": 131081,
    "sound_context_token_id": 27,
    "vit_hidden_size": 1280,
    "projector_hidden_size": 20480,
    "norm_mean": [0.48145466, 0.4578275, 0.40821073],
    "vision_config": {
        "auto_map": {"AutoConfig": "nvidia/C-RADIOv2-H--hf_model.RADIOConfig"},
        "model_type": "",
        "version": "radio_v2.5-h",
        "args": {"model": "vit_huge_patch16_224", "min_num_patches": 1024, "max_num_patches": 13312},
        "patch_size": 16,
        "max_resolution": 2048,
        "separate_video_embedder": True,
        "video_target_num_patches": 1024,
        "video_temporal_patch_size": 2,
    },
    "sound_config": {
        "model_type": "parakeet",
        "hidden_size": 1024,
        "num_attention_heads": 8,
        "num_hidden_layers": 24,
        "intermediate_size": 4096,
        "conv_kernel_size": 9,
        "convolution_bias": False,
        "subsampling_conv_channels": 256,
        "subsampling_factor": 8,
        "num_mel_bins": 128,
        "projection_hidden_size": 4096,
        "projection_bias": False,
        "sampling_rate": 16000,
    },
    "llm_config": {
        "architectures": ["NemotronHForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"},
        "model_type": "nemotron_h",
        "hidden_size": 2688,
        "num_hidden_layers": 52,
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        "vocab_size": 131072,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "mamba_num_heads": 64,
        "mamba_head_dim": 64,
        "ssm_state_size": 128,
        "conv_kernel": 4,
        "n_groups": 8,
        "n_routed_experts": 128,
        "num_experts_per_tok": 6,
        "n_shared_experts": 1,
        "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712,
        "routed_scaling_factor": 2.5,
    },
}


@pytest.fixture(scope="module")
def transformers_form(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with the same weights as transformers saves it."""
    folder = tmp_path_factory.mktemp("transformers_form")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        processor, model = TINY_FAMILIES["nemotron_h_omni"]([])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def section(path: Path) -> ModelSection:
    return ModelSection(path=str(path), dtype="float32")


def edited(checkpoint: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint with another config.json."""
    folder = Path(shutil.copytree(checkpoint, to))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(config)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_the_release_s_own_classes_are_left_alone(tiny_checkpoint: Callable[[str], Path]) -> None:
    path = tiny_checkpoint("nemotron_h_omni")
    assert json.loads((path / "config.json").read_text(encoding="utf-8"))["model_type"] == RELEASE
    for auto in (AutoConfig, AutoImageProcessor):  # the files do hold code, and it would be noticed
        with pytest.raises(RuntimeError, match="code of the checkpoint was run"):
            auto.from_pretrained(path, trust_remote_code=True)
    family = load_family(section(path), DataSection(rows="unused.json"))
    assert type(family) is NemotronHOmni
    assert type(family.config) is NemotronH_Omni_Reasoning_V3_Config
    assert type(family.processor) is NemotronH_Omni_Reasoning_V3Processor
    assert type(load_weights(section(path), family.config, torch.float32)) is NemotronH_Omni_Reasoning_V3


def test_both_forms_hold_the_same_model(
    tiny_checkpoint: Callable[[str], Path], transformers_form: Path, world: Path
) -> None:
    prepared, weights = [], []
    clip = read_video(world.parent / "clips" / "000000.mp4", FrameSampling(fps=8.0))
    for path in (tiny_checkpoint("nemotron_h_omni"), transformers_form):
        family = load_family(section(path), DataSection(rows="unused.json"))
        chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What moves?"}]}]
        text = family.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prepared.append(family.prepare(text, [clip], []))
        weights.append(load_weights(section(path), family.config, torch.float32).state_dict())
    released, own = prepared
    assert torch.equal(released.input_ids, own.input_ids)
    assert torch.equal(released.media["pixel_values_videos"][0], own.media["pixel_values_videos"][0])
    audio = {name for name in weights[0] if name.startswith(("audio_tower.", "embed_audio."))}
    assert audio
    assert weights[0].keys() - audio == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_frames_are_sized_as_the_vision_config_says(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["vision_config"] |= {"video_target_num_patches": 64, "video_maintain_aspect_ratio": False}

    path = edited(tiny_checkpoint("nemotron_h_omni"), tmp_path / "copy", change)
    processor = load_family(section(path), DataSection(rows="unused.json")).processor
    assert processor.video_processor.video_target_num_patches == 64
    assert not processor.video_processor.video_maintain_aspect_ratio
    assert processor.video_temporal_patch_dim == 2


def test_the_released_sizes_and_names() -> None:
    """Without weights: the tower is a ViT-H by default, and the names come to the 7349 tensors of the release."""
    config = read_config(FIELDS)
    assert config.model_type == "nemotron_h_omni"
    assert (config.image_token_id, config.audio_token_id, config.vision_hidden_size) == (18, 27, 1280)
    assert not {"auto_map", "architectures"} & {key for key, value in config.to_dict().items() if value}
    vision = config.vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (1280, 32, 16)
    assert (vision.num_summary_tokens, vision.max_img_size, vision.video_temporal_patch_size) == (10, 2048, 2)
    assert (config.audio_config.attention_bias, config.audio_config.scale_input) == (False, False)
    layers = config.text_config.layers_block_type
    assert [layers.count(kind) for kind in ("linear_attention", "moe", "full_attention")] == [23, 23, 6]

    model = without_weights(config)
    names = revert_weight_conversion(model, model.state_dict()).keys()
    stored = {name for name in names if not name.endswith(NemotronHOmni.not_stored)}
    assert len([name for name in stored if ".experts." in name]) == 5888
    assert len(stored) + 2 * len(NemotronHOmni.not_loaded) == 7349  # two statistics, two filters
    for name, _ in model.named_parameters():
        part_of(name, NemotronHOmni)  # or raises


def test_the_export_is_in_the_release_s_form(
    tiny_checkpoint: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    """All of the tower trained; what transformers neither loads nor stores is as it was."""
    base = tiny_checkpoint("nemotron_h_omni")
    settings = {"train__steps": 2, "train__batch_size": 2, "tuning__freeze": []}
    Run(recipe_of(arguments(base, world, tmp_path / "run", **settings))).train()
    export = export_run(tmp_path / "run", rate=0.6).path
    config = json.loads((export / "config.json").read_text(encoding="utf-8"))
    assert config == {**json.loads((base / "config.json").read_text(encoding="utf-8")), "video_pruning_rate": 0.6}
    assert {"llm_config", "sound_config", "vision_config", "auto_map"} <= config.keys()
    for name in ("configuration.py", "modeling.py", "image_processing.py", "preprocessor_config.json"):
        assert (export / name).read_bytes() == (base / name).read_bytes()

    before, after = load_file(base / "model.safetensors"), load_file(export / "model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    same = {name for name in before if torch.equal(before[name], after[name])}
    kept = {name for name in before if name.startswith(("sound_", *NemotronHOmni.not_loaded))}
    assert len(kept) > 40
    assert kept <= same
    trained = {name for name in before.keys() - same if name.startswith("vision_model.radio_model.model.blocks.")}
    assert len(trained) == 24  # two layers of twelve tensors
    assert load_config(str(export)).video_pruning_rate == 0.6
