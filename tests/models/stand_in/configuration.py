"""Stand-in for the code of Nemotron Nano 12B v2 VL: the names that the adapter uses, nothing of NVIDIA's."""

from __future__ import annotations

from typing import Any

from transformers import NemotronHConfig, PreTrainedConfig


class NemotronH_Nano_VL_V2_Config(PreTrainedConfig):
    model_type = "NemotronH_Nano_VL_V2"

    def __init__(self, llm_config: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.llm_config = NemotronHConfig(**(llm_config or {}))
