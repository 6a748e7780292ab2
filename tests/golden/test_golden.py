from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.record import CURVES, curve


def test_the_loss_curve_is_the_recorded_one(family_name: str, tmp_path: Path) -> None:
    recorded = json.loads(CURVES.read_text())[family_name]
    found = curve(family_name, tmp_path)
    assert found == pytest.approx(recorded, rel=2e-3)
    residuals = [new - old for new, old in zip(found, recorded, strict=True)]
    assert abs(sum(residuals) / len(residuals)) < 1e-3  # a small one-sided drift would hide in the tolerance
