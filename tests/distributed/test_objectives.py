"""Objectives with several passes on two real processes give the losses and gradients of one.

The rows are those of `test_modes.py`: in some step one process has videos and the other has none, or fewer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evs_train.uptrain import Run
from tests.runs import arguments, metrics, recipe_of, torchrun

STEPS = 4
OBJECTIVES: dict[str, dict[str, Any]] = {
    "teacher": {"kind": "teacher", "temperature": 2.0},
    "sandwich": {"kind": "sandwich", "lowest": 0.0, "highest": 0.8},
}
LORA: dict[str, Any] = {
    "tuning__method": "lora",
    "tuning__lora__r": 4,
    "tuning__lora__parts": ["vision", "language_model"],
    "tuning__lora__targets": ["qkv", "q_proj", "v_proj"],
}


def words(checkpoint: Path, rows: Path, output: Path, kind: str, processes: int, **options: Any) -> list[str]:
    return arguments(
        checkpoint,
        rows,
        output,
        objective=OBJECTIVES[kind],
        train__steps=STEPS,
        train__batch_size=2 // processes,
        evs__rate={"kind": "uniform", "min": 0.2, "max": 0.8},
        **options,
    )


@pytest.mark.parametrize("kind", sorted(OBJECTIVES))
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3_vl", {"deepspeed": None}),
        ("qwen3_vl", {"deepspeed": "zero2"}),
        ("qwen3_vl", {"deepspeed": "zero3"}),
        ("qwen3_vl", {"deepspeed": "zero3", **LORA}),
        ("glm4v", {"deepspeed": "zero3"}),
        ("nemotron_h_omni", {"deepspeed": None, "train__gradient_checkpointing": True}),
        ("nemotron_h_omni", {"deepspeed": "zero3"}),
    ],
    ids=["qwen-ddp", "qwen-zero2", "qwen-zero3", "qwen-lora-zero3", "glm-zero3", "nemotron-ddp", "nemotron-zero3"],
)
@pytest.mark.xdist_group("distributed")
def test_two_processes_give_the_curve_of_one(
    kind: str,
    family: str,
    options: dict[str, Any],
    tiny_checkpoint: Callable[[str], Path],
    mixed_rows: Path,
    tmp_path: Path,
) -> None:
    checkpoint = tiny_checkpoint(family)
    one, two = tmp_path / "one", tmp_path / "two"
    Run(recipe_of(words(checkpoint, mixed_rows, one, kind, 1, **(options | {"deepspeed": None})))).train()
    done = torchrun(words(checkpoint, mixed_rows, two, kind, 2, **options), 2)
    assert done.returncode == 0, done.stderr[-4000:]
    expected, found = metrics(one), metrics(two)
    assert len(found) == len(expected) == STEPS
    for alone, both in zip(expected, found, strict=True):
        assert both["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
        for name in (name for name in alone if name == "loss" or name.startswith("loss/")):
            assert both[name] == pytest.approx(alone[name], rel=1e-5, abs=1e-7), name
    assert expected[-1]["loss"] < expected[0]["loss"]
