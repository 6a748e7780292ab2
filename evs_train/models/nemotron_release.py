"""Nemotron 3 Nano Omni as NVIDIA released it, read by transformers' own classes and none of the checkpoint's code.

The released files say `model_type: NemotronH_Nano_Omni_Reasoning_V3` and send transformers to remote code (`auto_map`).
transformers 5.23 has the architecture itself (`nemotron_h_omni`): its config maps NVIDIA's field names, its image
processor takes NVIDIA's statistics, and its table of conversions renames NVIDIA's tensors on loading and back on
saving. Only the Auto classes do not find the way, because they go by `model_type` and the classes that the files name.

Untested with the released files, which could not be loaded. Read instead:
- fields of config.json: transformers `configuration_nemotron_h_omni.py` (`_legacy_field_names`), ollama's tests of its
  converter (`TestNemotronHNanoOmniReasoningV3LoadModelMetadata`), vLLM and SGLang (`nano_nemotron_vl.py`).
  `video_target_num_patches`, `video_maintain_aspect_ratio` and `video_temporal_patch_size` stand in `vision_config`,
  the tower's sizes do not: it is a ViT-H, as transformers' defaults are;
- files of the processor: mlx-vlm (`nemotron_h_nano_omni`) and its tests;
- names of tensors: Megatron-Bridge's bridge of Nemotron Omni, vLLM, SGLang, mlx-vlm. Counted by those names the release
  has 7349 tensors, as a published converter that compares each one says: no `summary_idxs` and no `lambda1`, but every
  `num_batches_tracked`, the conditioner's two statistics and the audio front end's two filters.

Cost: none beside reading the files. What it cannot do: quantized releases (FP8, NVFP4), and Super Omni, whose draft
head was not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import (
    AutoTokenizer,
    NemotronH_Omni_Reasoning_V3_Config,
    NemotronH_Omni_Reasoning_V3ImageProcessor,
    NemotronH_Omni_Reasoning_V3Processor,
    NemotronH_Omni_Reasoning_V3VideoProcessor,
    ParakeetFeatureExtractor,
)

_OF_REMOTE_CODE = ("model_type", "architectures", "auto_map")
_SECTIONS = ("llm_config", "vision_config", "sound_config")
_OF_VIDEOS = ("video_target_num_patches", "video_maintain_aspect_ratio")


def read_config(fields: Mapping[str, Any]) -> Any:
    """transformers' own configuration from the fields of the released config.json.

    Raises:
        ValueError, StrictDataclassError: the fields do not fit.
    """
    own = {key: value for key, value in fields.items() if key not in _OF_REMOTE_CODE}
    for section in _SECTIONS:
        if isinstance(own.get(section), Mapping):
            own[section] = {key: value for key, value in own[section].items() if key not in _OF_REMOTE_CODE}
    return NemotronH_Omni_Reasoning_V3_Config.from_dict(own)


def read_processor(path: str, revision: str | None, config: Any) -> Any:
    """transformers' own processor from the released preprocessor_config.json, chat template and tokenizer.

    Frames have the image processor's patches and statistics, and their size from the configuration's `vision_config`.

    Args:
        path: directory or hub name.
        revision: `model.revision`.
        config: what `read_config` returned.

    Raises:
        OSError, ValueError: a file is missing or cannot be read.
    """
    found, _ = NemotronH_Omni_Reasoning_V3ImageProcessor.get_image_processor_dict(path, revision=revision)
    values = {key: value for key, value in found.items() if key not in ("auto_map", "image_processor_type")}
    of_images = NemotronH_Omni_Reasoning_V3ImageProcessor(**values)
    of_videos = config.vision_config.to_dict() | values
    tokenizer: Any = AutoTokenizer.from_pretrained(path, revision=revision, config=config, trust_remote_code=False)
    return NemotronH_Omni_Reasoning_V3Processor(
        image_processor=of_images,
        video_processor=NemotronH_Omni_Reasoning_V3VideoProcessor(
            norm_mean=values.get("norm_mean", of_images.image_mean),
            norm_std=values.get("norm_std", of_images.image_std),
            patch_size=of_images.patch_size,
            downsample_ratio=of_images.downsample_ratio,
            **{key: of_videos[key] for key in _OF_VIDEOS if key in of_videos},
        ),
        tokenizer=tokenizer,
        feature_extractor=ParakeetFeatureExtractor(),  # the processor refuses to be made without one; audio is not read
        video_temporal_patch_dim=config.video_temporal_patch_size,
        chat_template=tokenizer.chat_template,
    )
