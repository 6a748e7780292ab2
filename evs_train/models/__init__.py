"""Model families by the `model_type` of their config.json. A new family is one file and one line here."""

from __future__ import annotations

from evs_train.models.base import Family
from evs_train.models.internvl import InternVL
from evs_train.models.nemotron_h_omni import NemotronHOmni
from evs_train.models.qwen2_5_vl import Qwen25VL
from evs_train.models.qwen3_vl import Qwen3VL
from evs_train.models.qwen3_vl_moe import Qwen3VLMoe

FAMILIES: dict[str, type[Family]] = {
    "qwen3_vl": Qwen3VL,
    "qwen3_vl_moe": Qwen3VLMoe,
    "qwen2_5_vl": Qwen25VL,
    "nemotron_h_omni": NemotronHOmni,
    "internvl": InternVL,
}
