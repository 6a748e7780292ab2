"""DDP, ZeRO-2 and ZeRO-3 on two real processes give the loss curve of one process with the same global batch.

The rows are such that in some step one process has videos and the other has none, or fewer: a vision tower that is not
run on every rank, equally often under ZeRO-3, hangs or fails here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from evs_train.data.manifest import read_rows
from evs_train.data.order import DrawOrder
from evs_train.uptrain import Run
from tests.runs import STILL, Ranks, arguments, assert_only_rounding, metrics, recipe_of

STEPS = 4
MODES = (None, "zero2", "zero3")


def words(checkpoint: Path, rows: Path, output: Path, processes: int, deepspeed: str | None) -> list[str]:
    return arguments(
        checkpoint,
        rows,
        output,
        deepspeed=deepspeed,
        train__steps=STEPS,
        train__batch_size=2 // processes,
        evs__rate={"kind": "uniform", "min": 0.2, "max": 0.8},
    )


def test_the_rows_are_uneven_over_ranks(mixed_rows: Path) -> None:
    samples = read_rows([mixed_rows])
    per_step = [
        tuple(len(samples[DrawOrder(len(samples), 0).row(2 * step + rank)].videos) for rank in range(2))
        for step in range(STEPS)
    ]
    assert any(0 in counts and max(counts) > 0 for counts in per_step), per_step
    assert any(2 in counts and counts != (2, 2) for counts in per_step), per_step


@pytest.mark.capability("DDP, ZeRO-2, ZeRO-3", "yes")
def test_two_processes_give_the_curve_of_one(
    family_name: str, tiny_checkpoint: Callable[[str], Path], mixed_rows: Path, tmp_path: Path, two_ranks: Ranks
) -> None:
    checkpoint = tiny_checkpoint(family_name)
    Run(recipe_of(words(checkpoint, mixed_rows, tmp_path / "one", 1, None))).train()
    expected = metrics(tmp_path / "one")
    assert expected[-1]["loss"] < expected[0]["loss"]
    outputs = {mode: tmp_path / str(mode) for mode in MODES}
    two_ranks.train(*(words(checkpoint, mixed_rows, output, 2, mode) for mode, output in outputs.items()))
    for mode, output in outputs.items():
        found = metrics(output)
        assert len(found) == len(expected) == STEPS, mode
        for one, two in zip(expected, found, strict=True):
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-5), mode
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4), mode
            for name in ("evs/rate", "evs/video_tokens_before", "evs/video_tokens_after", "evs/supervised_tokens"):
                assert two[name] == pytest.approx(one[name]), (mode, name)


def test_splitting_a_batch_over_processes_leaves_rounding_only(
    tiny_checkpoint: Callable[[str], Path], mixed_rows: Path, tmp_path: Path, two_ranks: Ranks
) -> None:
    """Rows of one step differ in their number of supervised tokens, so averages of averages would show at once."""
    options = {"train__steps": 8, "evs__rate": 0.5, **STILL}
    checkpoint = tiny_checkpoint("qwen3_vl")
    whole, split = tmp_path / "whole", tmp_path / "split"
    Run(recipe_of(arguments(checkpoint, mixed_rows, whole, train__batch_size=2, **options))).train()
    two_ranks.train(arguments(checkpoint, mixed_rows, split, train__batch_size=1, **options))
    assert_only_rounding(metrics(whole), metrics(split))
