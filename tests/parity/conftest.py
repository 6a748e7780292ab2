from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from evs_train.config import TuningSection
from evs_train.models import FAMILIES
from evs_train.models.tuning import apply_tuning
from tests.parity.rig import Rig

_RIGS: dict[str, Rig] = {}


@pytest.fixture
def seed() -> int:
    """Of the weights; a test that is parametrized by `seed` runs with several (`Rig.reseed`)."""
    return 0


@pytest.fixture
def rig(family_name: str, seed: int, tiny_checkpoint: Callable[[str], Path], mixed_rows: Path) -> Rig:
    """A rig of every family in turn, in training mode and without gradients."""
    return fresh(family_name, tiny_checkpoint, mixed_rows, seed)


@pytest.fixture
def qwen(tiny_checkpoint: Callable[[str], Path], mixed_rows: Path) -> Rig:
    return fresh("qwen3_vl", tiny_checkpoint, mixed_rows)


@pytest.fixture(params=sorted(name for name, family in FAMILIES.items() if family.attention_only))
def attention_rig(
    request: pytest.FixtureRequest, seed: int, tiny_checkpoint: Callable[[str], Path], mixed_rows: Path
) -> Rig:
    """A rig of every family whose tokens meet in attention only, so that masking a token takes it away."""
    return fresh(request.param, tiny_checkpoint, mixed_rows, seed)


@pytest.fixture(params=sorted(name for name, family in FAMILIES.items() if not family.attention_only))
def recurrent_family(request: pytest.FixtureRequest) -> str:
    """Every family with layers that see a shorter sequence when tokens are dropped."""
    return str(request.param)


@pytest.fixture
def recurrent_rig(recurrent_family: str, seed: int, tiny_checkpoint: Callable[[str], Path], mixed_rows: Path) -> Rig:
    return fresh(recurrent_family, tiny_checkpoint, mixed_rows, seed)


@pytest.fixture
def nemotron(tiny_checkpoint: Callable[[str], Path], mixed_rows: Path) -> Rig:
    return fresh("nemotron_h_omni", tiny_checkpoint, mixed_rows)


def fresh(family: str, tiny_checkpoint: Callable[[str], Path], rows: Path, seed: int = 0) -> Rig:
    if family not in _RIGS:
        _RIGS[family] = Rig(tiny_checkpoint(family), rows)
    rig = _RIGS[family]
    rig.reseed(seed)
    rig.model.train()
    apply_tuning(rig.model, rig.family, TuningSection(freeze=[]))
    rig.model.zero_grad(set_to_none=True)
    return rig
