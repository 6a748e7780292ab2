"""Kept features on a GPU: what is found trains as what was computed, and copies to the host do not tear."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evs_train.uptrain import Run
from tests.runs import arguments, metrics, recipe_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_a_second_run_finds_what_the_first_computed(
    family_name: str, tiny_checkpoint: Callable[[str], Path], mixed_rows: Path, tmp_path: Path
) -> None:
    def train(name: str, **options: Any) -> list[dict[str, Any]]:
        frozen: dict[str, Any] = {"tuning__freeze": ["vision"], "optim__lr_by_part": {}, "train__steps": 5}
        words = arguments(
            tiny_checkpoint(family_name), mixed_rows, tmp_path / name, model__dtype="bfloat16", **frozen, **options
        )
        Run(recipe_of(words)).train()
        return metrics(tmp_path / name)

    plain = train("plain")
    cache = {"path": str(tmp_path / "cache"), "max_gib": 1}
    first, second = (train(name, data__cache_features=cache) for name in ("first", "second"))
    assert sum(line["data/feature_cache_misses"] for line in second) == 0
    assert [(line["loss"], line["grad_norm"]) for line in first] == [
        (line["loss"], line["grad_norm"]) for line in second
    ]
    for one, other in zip(plain, first, strict=True):  # the tower may round otherwise for one medium than for several
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-2)
