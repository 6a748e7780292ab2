"""Model families by the `model_type` of their config.json. A new family is one file and one line here.

Those in `REMOTE_FAMILIES` are not in transformers: their code comes with the checkpoint and is run only if the recipe
says so (`remote_code.py`). Tests have a stand-in for it, so the suites that run over `FAMILIES` leave them out.
"""

from __future__ import annotations

from evs_train.models.base import Family
from evs_train.models.glm4v import Glm4v
from evs_train.models.glm46v import Glm46V
from evs_train.models.internvl import InternVL
from evs_train.models.llava_onevision import LlavaOnevision
from evs_train.models.nemotron_h_omni import NemotronHOmni
from evs_train.models.nemotron_nano_vl_v2 import NemotronNanoVLV2
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
    "internvl": InternVL,
}
REMOTE_FAMILIES: dict[str, type[Family]] = {
    "NemotronH_Nano_VL_V2": NemotronNanoVLV2,
}
# Releases whose config.json has a model type of its own, and the family in transformers that they are read as.
RELEASED_AS: dict[str, str] = {
    "NemotronH_Nano_Omni_Reasoning_V3": "nemotron_h_omni",  # nemotron_release.py
}
