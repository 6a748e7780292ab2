from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from evs_train.config import TuningSection
from evs_train.models import FAMILIES
from evs_train.models.loading import apply_tuning
from tests.parity.rig import Rig

_RIGS: dict[str, Rig] = {}


@pytest.fixture
def rig(family_name: str, tiny_checkpoint: Callable[[str], Path], mixed_rows: Path) -> Rig:
    """A rig of every family in turn, in training mode and without gradients."""
    return fresh(family_name, tiny_checkpoint, mixed_rows)


@pytest.fixture
def qwen(tiny_checkpoint: Callable[[str], Path], mixed_rows: Path) -> Rig:
    return fresh("qwen3_vl", tiny_checkpoint, mixed_rows)


@pytest.fixture(params=sorted(FAMILIES.keys() - {"nemotron_h_omni"}))
def attention_rig(request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Path], mixed_rows: Path) -> Rig:
    """A rig of every family whose tokens meet in attention only, so that masking a token takes it away."""
    return fresh(request.param, tiny_checkpoint, mixed_rows)


@pytest.fixture
def nemotron(tiny_checkpoint: Callable[[str], Path], mixed_rows: Path) -> Rig:
    return fresh("nemotron_h_omni", tiny_checkpoint, mixed_rows)


def fresh(family: str, tiny_checkpoint: Callable[[str], Path], rows: Path) -> Rig:
    if family not in _RIGS:
        _RIGS[family] = Rig(tiny_checkpoint(family), rows)
    rig = _RIGS[family]
    rig.model.train()
    apply_tuning(rig.model, rig.family, TuningSection(freeze=[]))
    rig.model.zero_grad(set_to_none=True)
    return rig
