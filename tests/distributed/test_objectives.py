"""Objectives with several passes on two real processes give the losses and gradients of one.

The rows are those of `test_modes.py`: in some step one process has videos and the other has none, or fewer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evs_train.uptrain import Run
from tests.runs import STILL, Ranks, arguments, metrics, recipe_of

STEPS = 4
RATE = {"kind": "uniform", "min": 0.2, "max": 0.8}
# KL is about 1e-4 here: the weight makes it count in the loss and in the gradient.
TEACHER: dict[str, Any] = {"kind": "teacher", "temperature": 2.0, "teacher_weight": 100.0}
SANDWICH: dict[str, Any] = {"kind": "sandwich", "lowest": 0.0, "highest": 0.8}
LORA: dict[str, Any] = {
    "tuning__method": "lora",
    "tuning__lora__r": 4,
    "tuning__lora__parts": ["vision", "language_model"],
    "tuning__lora__targets": ["qkv", "q_proj", "v_proj"],
}


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "teacher-lora-zero3": ("qwen3_vl", TEACHER, {"deepspeed": "zero3", **LORA}),
    "teacher-zero3": ("nemotron_h_omni", TEACHER, {"deepspeed": "zero3"}),
    "sandwich-ddp": ("nemotron_h_omni", SANDWICH, {"deepspeed": None, "train__gradient_checkpointing": True}),
    "sandwich-zero2": ("qwen3_vl", SANDWICH, {"deepspeed": "zero2"}),
    "sandwich-checkpointing-zero3": ("glm4v", SANDWICH, {"deepspeed": "zero3", "train__gradient_checkpointing": True}),
}


@pytest.mark.parametrize("kind", ["teacher", "sandwich"])
def test_two_processes_give_the_curve_of_one(
    kind: str, tiny_checkpoint: Callable[[str], Path], mixed_rows: Path, tmp_path: Path, two_ranks: Ranks
) -> None:
    cases = {name: case for name, case in CASES.items() if case[1]["kind"] == kind}

    def words(case: str, folder: str, processes: int, **others: Any) -> list[str]:
        family, objective, options = cases[case]
        settings = {"objective": objective, "train__steps": STEPS, "train__batch_size": 2 // processes, **STILL}
        output = tmp_path / folder / case
        return arguments(tiny_checkpoint(family), mixed_rows, output, **settings, **options | others, evs__rate=RATE)

    two_ranks.train(*(words(case, "two", 2) for case in cases))
    for case in cases:
        Run(recipe_of(words(case, "one", 1, deepspeed=None))).train()
        expected, found = metrics(tmp_path / "one" / case), metrics(tmp_path / "two" / case)
        assert len(found) == len(expected) == STEPS, case
        for alone, both in zip(expected, found, strict=True):
            assert both["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5), case
            for name in (name for name in alone if name == "loss" or name.startswith("loss/")):
                assert both[name] == pytest.approx(alone[name], rel=1e-6, abs=1e-7), (case, name)
