"""Two processes share one cache: DDP and ZeRO-3 give the curve of one process that has none.

Some steps find what one rank needs and compute what the other needs, and in some a rank has no media at all; under
ZeRO-3 a tower or projector that is not called equally often everywhere hangs here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evs_train.uptrain import Run
from tests.runs import Ranks, arguments, metrics, recipe_of

OPTIONS: dict[str, Any] = {
    "train__steps": 6,
    "evs__rate": {"kind": "uniform", "min": 0.2, "max": 0.8},
    "optim__lr_by_part": {},
}


@pytest.mark.parametrize(
    ("family", "deepspeed", "frozen"),
    [
        ("qwen3_vl", None, ["vision"]),
        pytest.param("nemotron_h_omni", "zero3", ["vision"], marks=pytest.mark.exhaustive),
        pytest.param("nemotron_h_omni", "zero3", ["vision", "projector"], marks=pytest.mark.exhaustive),
    ],
)
def test_two_processes_give_the_curve_of_one(
    family: str,
    deepspeed: str | None,
    frozen: list[str],
    tiny_checkpoint: Callable[[str], Path],
    mixed_rows: Path,
    tmp_path: Path,
    two_ranks: Ranks,
) -> None:
    checkpoint, options = tiny_checkpoint(family), OPTIONS | {"tuning__freeze": frozen}
    Run(recipe_of(arguments(checkpoint, mixed_rows, tmp_path / "one", train__batch_size=2, **options))).train()
    cache = {"path": str(tmp_path / "cache"), "max_gib": 1}
    words = arguments(
        checkpoint, mixed_rows, tmp_path / "two", deepspeed=deepspeed, data__cache_features=cache, **options,
        train__batch_size=1,
    )  # fmt: skip
    two_ranks.train(words)
    expected, found = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    counts = [(line["data/feature_cache_hits"], line["data/feature_cache_misses"]) for line in found]
    assert any(min(one) > 0 for one in counts), counts
    assert counts[0][0] == counts[-1][1] == 0
    for one, two in zip(expected, found, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
