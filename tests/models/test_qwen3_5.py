"""Qwen3.5: what adapters reach, and that no layer passes its adapter by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from evs_train.config import TuningSection
from evs_train.models.loading import without_weights
from evs_train.models.tuning import apply_tuning
from tests.parity.rig import Rig


@pytest.fixture(scope="module")
def rig(tiny_checkpoint: Callable[[str], Path], mixed_rows: Path) -> Rig:
    return Rig(tiny_checkpoint("qwen3_5"), mixed_rows)


def test_adapters_reach_every_linear_layer_of_the_language_model(rig: Rig) -> None:
    layers = without_weights(rig.family.config).get_submodule("model.language_model.layers")
    linear = {name.rsplit(".", 1)[-1] for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    assert linear == set(rig.family.lora_targets)


def test_every_adapter_learns(rig: Rig) -> None:
    """A kernel that reads a layer's weight by itself would leave its adapter without a gradient."""
    rig.model = apply_tuning(rig.model, rig.family, TuningSection(method="lora"))
    out: Any
    out, _ = rig.forward(rig.batch(("two", "image"), 0.5))
    out.loss.backward()
    adapters = {name: p.grad for name, p in rig.model.named_parameters() if ".lora_B." in name}
    assert len(adapters) == 2 * 8 + 7  # two DeltaNet layers and one of attention, each with its three of the MLP
    assert [name for name, grad in adapters.items() if grad is None or not grad.any()] == []


def test_the_score_is_the_pooled_embeddings(rig: Rig) -> None:
    features = [torch.randn(6, 4)]
    assert rig.family.score_tensor(features) is features[0]
