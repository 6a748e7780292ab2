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
from tests.runs import STILL, arguments, assert_only_rounding, metrics, recipe_of, torchrun

STEPS = 6


def run(checkpoint: Path, rows: Path, output: Path, processes: int, deepspeed: str | None) -> Path:
    words = arguments(
        checkpoint,
        rows,
        output,
        deepspeed=deepspeed,
        train__steps=STEPS,
        train__batch_size=2 // processes,
        evs__rate={"kind": "uniform", "min": 0.2, "max": 0.8},
    )
    if processes == 1:
        Run(recipe_of(words)).train()
        return output
    done = torchrun(words, processes)
    assert done.returncode == 0, done.stderr[-4000:]
    return output


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    finished: dict[str, Path] = {}

    def output_of(family: str, checkpoint: Path, rows: Path) -> Path:
        if family not in finished:
            finished[family] = run(checkpoint, rows, tmp_path_factory.mktemp("one"), 1, None)
        return finished[family]

    return output_of


def test_the_rows_are_uneven_over_ranks(mixed_rows: Path) -> None:
    samples = read_rows([mixed_rows])
    per_step = [
        tuple(len(samples[DrawOrder(len(samples), 0).row(2 * step + rank)].videos) for rank in range(2))
        for step in range(STEPS)
    ]
    assert any(0 in counts and max(counts) > 0 for counts in per_step), per_step
    assert any(2 in counts and counts != (2, 2) for counts in per_step), per_step


@pytest.mark.capability("DDP, ZeRO-2, ZeRO-3", "yes")
@pytest.mark.parametrize("deepspeed", [None, "zero2", "zero3"])
@pytest.mark.xdist_group("distributed")
def test_two_processes_give_the_curve_of_one(
    family_name: str,
    deepspeed: str | None,
    tiny_checkpoint: Callable[[str], Path],
    mixed_rows: Path,
    one_process: Callable[..., Path],
    tmp_path: Path,
) -> None:
    checkpoint = tiny_checkpoint(family_name)
    expected = metrics(one_process(family_name, checkpoint, mixed_rows))
    found = metrics(run(checkpoint, mixed_rows, tmp_path / "two", 2, deepspeed))
    assert len(found) == len(expected) == STEPS
    for one, two in zip(expected, found, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        for name in ("evs/rate", "evs/video_tokens_before", "evs/video_tokens_after", "evs/supervised_tokens"):
            assert two[name] == pytest.approx(one[name]), name
    assert expected[-1]["loss"] < expected[0]["loss"]


@pytest.mark.xdist_group("distributed")
def test_splitting_a_batch_over_processes_leaves_rounding_only(
    tiny_checkpoint: Callable[[str], Path], mixed_rows: Path, tmp_path: Path
) -> None:
    """Rows of one step differ in their number of supervised tokens, so averages of averages would show at once."""
    options = {"train__steps": 8, "evs__rate": 0.5, **STILL}
    checkpoint = tiny_checkpoint("qwen3_vl")
    whole, split = tmp_path / "whole", tmp_path / "split"
    Run(recipe_of(arguments(checkpoint, mixed_rows, whole, train__batch_size=2, **options))).train()
    done = torchrun(arguments(checkpoint, mixed_rows, split, train__batch_size=1, **options), 2)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_only_rounding(metrics(whole), metrics(split))
