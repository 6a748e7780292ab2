"""Model families by the `model_type` of their config.json. A new family is one file and one line here."""

from __future__ import annotations

from evs_train.models.base import Family
from evs_train.models.nemotron_h_omni import NemotronHOmni
from evs_train.models.qwen3_vl import Qwen3VL

FAMILIES: dict[str, type[Family]] = {
    "qwen3_vl": Qwen3VL,
    "nemotron_h_omni": NemotronHOmni,
}
