"""`train.resume=auto`: one command that starts a run and goes on with it, and never starts over broken checkpoints."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evs_train.commit import MANIFEST
from evs_train.errors import RecipeError
from evs_train.uptrain import Run
from tests.runs import arguments, metrics, recipe_of

STEPS = 3


@pytest.fixture
def start(tiny_checkpoint: Callable[[str], Path], world: Path, tmp_path: Path) -> Callable[..., Any]:
    def train(**options: Any) -> Any:
        settings = {"train__steps": STEPS, "train__batch_size": 1, "train__save_every": 1, "train__resume": "auto"}
        words = arguments(tiny_checkpoint("qwen3_vl"), world, tmp_path / "run", **(settings | options))
        return Run(recipe_of(words)).train()

    return train


@pytest.fixture
def output(start: Callable[..., Any], tmp_path: Path) -> Path:
    """A run that was killed before its last save."""
    start()
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / f"checkpoint-{STEPS}")
    return tmp_path / "run"


def steps(output: Path) -> list[int]:
    return [line["step"] for line in metrics(output)]


def test_it_starts_where_there_is_nothing_and_goes_on_where_there_is(start: Callable[..., Any], output: Path) -> None:
    before = metrics(output)
    assert start().steps == STEPS
    after = metrics(output)
    assert [line["time"] for line in after[:-1]] == [line["time"] for line in before[:-1]]  # were not trained again
    assert [line["loss"] for line in after] == [line["loss"] for line in before]
    assert not (output / "older").exists()


def test_it_starts_again_where_no_checkpoint_was_reached(
    start: Callable[..., Any], output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in output.glob("checkpoint-*"):
        shutil.rmtree(folder)
    with caplog.at_level(logging.WARNING):
        start()
    assert steps(output) == [1, 2, 3]
    (before,) = (output / "older").glob("*/metrics.jsonl")  # nothing is lost, and nothing is moved in silence
    assert f"{output} holds an earlier run, which was moved to {before.parent}" in caplog.text


def test_a_broken_newest_one_is_named_and_passed_over(
    start: Callable[..., Any], output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start()
    shutil.rmtree(output / "final")
    os.truncate(output / "checkpoint-3" / "optimizer.pt", 1000)
    with caplog.at_level(logging.WARNING):
        start()
    assert "checkpoint-2, the newest that is whole; checkpoint-3: optimizer.pt has 1000 bytes instead of" in caplog.text
    assert steps(output) == [1, 2, 3]


@pytest.mark.parametrize("resume", ["auto", True])
def test_only_broken_ones_stop_it(resume: str | bool, start: Callable[..., Any], output: Path) -> None:
    (output / "checkpoint-2" / MANIFEST).unlink()
    shutil.copytree(output / "checkpoint-2", output / "checkpoint-1")
    (output / "checkpoint-1" / MANIFEST).write_text("{")
    before = sorted(output.rglob("*"))
    with pytest.raises(RecipeError) as stopped:
        start(**({} if resume == "auto" else {"train__resume": True}))
    assert f"checkpoint-2: it has no {MANIFEST}" in stopped.value.message
    assert f"checkpoint-1: its {MANIFEST} is damaged" in stopped.value.message
    assert sorted(output.rglob("*")) == before


def test_nothing_is_unpickled_before_it_is_hashed(
    start: Callable[..., Any], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = output / "checkpoint-2" / "optimizer.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    loaded = []
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: loaded.append(args))
    with pytest.raises(RecipeError, match=r"optimizer\.pt is not what was written: its SHA-256 differs"):
        start()
    assert loaded == []


def test_what_is_missing_behind_the_last_step_is_written(start: Callable[..., Any], output: Path) -> None:
    start()
    weights = (output / "final" / "model.safetensors").read_bytes()
    shutil.rmtree(output / "final")
    summary = start()
    assert (output / "final" / "model.safetensors").read_bytes() == weights
    assert steps(output) == [1, 2, 3]
    lines = metrics(output)
    assert (summary.steps, summary.first_loss, summary.last_loss) == (STEPS, lines[0]["loss"], lines[-1]["loss"])
    assert start().steps == STEPS  # and when all is there


def test_a_finished_run_without_checkpoints_is_not_started_again(start: Callable[..., Any], tmp_path: Path) -> None:
    start(train__save_every=None, train__steps=1)
    with pytest.raises(RecipeError, match="final"):
        start(train__save_every=None, train__steps=1)
    assert (tmp_path / "run" / "final").is_dir()
