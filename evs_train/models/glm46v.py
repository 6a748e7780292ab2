"""GLM-4.6V under its own architecture (`glm46v`): GLM-4.1V with times in tenths of a second (see `glm4v.py`).

Its config names the architectures of tower and language model; GLM-4.1V's are the default. Another language model has
other linear layers: adapters go where the names of `lora_targets` occur, and `tuning.lora.targets` names others.
"""

from __future__ import annotations

from typing import ClassVar

from evs_train.models.glm4v import Glm4v


class Glm46V(Glm4v):
    """Adapter of GLM-4.6V."""

    model_type: ClassVar[str] = "glm46v"
