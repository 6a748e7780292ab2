"""Model families by the `model_type` of their config.json. A new family is one file and one line here."""

from __future__ import annotations

from evs_train.models.base import Family
from evs_train.models.glm4v import Glm4v
from evs_train.models.glm46v import Glm46V
from evs_train.models.llava_onevision import LlavaOnevision
from evs_train.models.nemotron_h_omni import NemotronHOmni
from evs_train.models.qwen2_5_vl import Qwen25VL
from evs_train.models.qwen3_5 import Qwen35
from evs_train.models.qwen3_vl import Qwen3VL
from evs_train.models.qwen3_vl_moe import Qwen3VLMoe
from evs_train.models.video_llama_3 import VideoLlama3

FAMILIES: dict[str, type[Family]] = {
    "qwen3_vl": Qwen3VL,
    "qwen3_vl_moe": Qwen3VLMoe,
    "qwen2_5_vl": Qwen25VL,
    "qwen3_5": Qwen35,
    "glm4v": Glm4v,
    "glm46v": Glm46V,
    "llava_onevision": LlavaOnevision,
    "video_llama_3": VideoLlama3,
    "nemotron_h_omni": NemotronHOmni,
}
