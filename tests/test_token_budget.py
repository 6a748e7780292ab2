"""Batches of a token budget, from planning to training: what is planned is what is read, to the token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evs_train.config import Recipe
from evs_train.data import lengths
from evs_train.data.budget import BudgetBatches
from evs_train.data.chat import Example
from evs_train.data.index import index_file
from evs_train.errors import RecipeError
from evs_train.inputs import Inputs
from evs_train.models import FAMILIES
from evs_train.uptrain import Run
from tests.data.test_video import write_video
from tests.runs import STILL, Ranks, arguments, assert_only_rounding, metrics, recipe_of

UNIFORM = {"kind": "uniform", "min": 0.0, "max": 0.9}


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows of videos of 2 to 40 frames, one of them long, one image, two of text."""
    folder = tmp_path_factory.mktemp("long")
    rows: list[dict[str, Any]] = []
    for number, count in enumerate((2, 4, 6, 8, 8, 10, 12, 16, 40)):
        write_video(folder / f"{number}.mp4", range(0, 100 * count, 100))
        talk = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": f"Number {number}."}]
        rows.append({"id": f"v{number}", "video": f"{number}.mp4", "conversations": talk})
    for number in range(2):
        talk = [{"from": "human", "value": "Say it. " * (1 + 9 * number)}, {"from": "gpt", "value": "It."}]
        rows.append({"id": f"t{number}", "conversations": talk})
    file = folder / "rows.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


@pytest.fixture
def recipe(tiny_checkpoint: Callable[[str], Path], long_rows: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(family: str = "qwen3_vl", rows: Path = long_rows, name: str = "run", **options: Any) -> Recipe:
        return recipe_of(words(tiny_checkpoint(family), rows, tmp_path / name, tmp_path / "media.arrow", **options))

    return make


def words(checkpoint: Path, rows: Path, output: Path, index: Path, **options: Any) -> list[str]:
    settings: dict[str, Any] = {
        "data__max_tokens_per_batch": 300,
        "data__num_frames": None,
        "data__fps": 10,
        "data__min_frames": 2,
        "data__index": index,
        "train__batch_size": 1,
        "train__grad_accumulation": 2,
        "train__steps": None,
        "evs__rate": UNIFORM,
        **options,
    }
    return arguments(checkpoint, rows, output, **settings)


def budget_of(run: Inputs) -> int:
    """A budget that the longest row does not keep at a rate of at most 0.2, unless it loses frames."""
    return int(0.75 * max(row.full.num_tokens for row in run.plan(0) if isinstance(row, lengths.PlannedRow)))


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_what_is_planned_is_what_is_read(family_name: str, scope: str, recipe: Callable[..., Recipe]) -> None:
    packing = FAMILIES[family_name].attention_only and scope == "batch"
    rate = {"kind": "uniform", "min": 0.0, "max": 0.2}
    options = {"train__packing": packing, "evs__scope": scope, "train__epochs": 2, "evs__rate": rate}
    budget = budget_of(Inputs(recipe(family_name, **options)))
    run = Inputs(recipe(family_name, data__max_tokens_per_batch=budget, **options))
    shares = set()
    assert isinstance(run.schedule, BudgetBatches)
    for number in range(len(run.stream)):
        batch, slots = run.collator([run.stream[number]]), run.schedule.batch(number).slots
        assert batch["plan"].num_tokens == tuple(slot.num_tokens for slot in slots)
        assert batch["plan"].draws == tuple(slot.draw for slot in slots)
        assert batch["plan"].shape[0] * batch["plan"].shape[1] <= budget
        assert batch["plan"].bad == ((),) * len(slots)
        shares |= set(batch["plan"].shares)
    assert len(shares) > 1
    assert max(shares) == 1.0
    assert run.schedule.usage().shortened > 0


def test_rows_are_measured_once(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    plan_row = lengths.plan_row

    def counted(reader: Any, sample: Any, *rest: Any) -> Any:
        measured.append(sample.id)
        return plan_row(reader, sample, *rest)

    monkeypatch.setattr(lengths, "plan_row", counted)
    unbound = Inputs(recipe(data__max_tokens_per_batch=None)).plan(0)
    assert len(measured) == len(unbound) == 11
    measured.clear()
    bound = Inputs(recipe(data__max_tokens_per_batch=100)).plan(0)
    assert "v8" in measured  # more levels of the long ones
    assert len(measured) < 8
    assert [row.full for row in bound] == [row.full for row in unbound]  # type: ignore[union-attr]
    measured.clear()
    assert Inputs(recipe(data__max_tokens_per_batch=100)).plan(0) == bound
    assert Inputs(recipe(data__max_tokens_per_batch=200)).plan(2)[:8] == bound[:8]
    assert measured == []
    Inputs(recipe(data__fps=5)).plan(0)
    assert len(measured) == 11


@pytest.mark.parametrize("packing", [False, True])
def test_a_resumed_run_goes_on_as_if_never_stopped(
    recipe: Callable[..., Recipe], packing: bool, tmp_path: Path
) -> None:
    options = {"train__save_every": 2, "train__keep_checkpoints": 9, "train__packing": packing, "train__epochs": 2}
    whole = Run(recipe(name="whole", **options))
    assert whole.schedule.num_steps > 2
    whole.train()
    Run(recipe(name="resumed", **options)).train()
    resumed = tmp_path / "resumed"
    shutil.rmtree(resumed / "final")
    for folder in resumed.glob("checkpoint-*"):
        if folder.name != "checkpoint-2":
            shutil.rmtree(folder)
    Run(recipe(name="resumed", train__resume=True, **options)).train()
    keys = ("step", "loss", "grad_norm", "evs/rate", "evs/video_tokens_after", "evs/padding")
    one, other = metrics(tmp_path / "whole"), metrics(resumed)
    assert [[m[k] for k in keys] for m in other] == [[m[k] for k in keys] for m in one]
    assert sum(m["data/shortened"] for m in one) == whole.schedule.usage().shortened  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match=r"step \(was 2 .* micro-batches of 300 tokens \(plan "):
        Run(recipe(name="resumed", train__resume=True, **options | {"data__max_tokens_per_batch": 310})).train()


@pytest.mark.parametrize("packing", [False, True])
def test_two_processes_give_the_loss_of_one(
    tiny_checkpoint: Callable[[str], Path], long_rows: Path, tmp_path: Path, packing: bool, two_ranks: Ranks
) -> None:
    """Each step's micro-batches are the same; the second process waits while the first one measures the rows."""
    options = {"train__packing": packing, "train__steps": 8, **STILL}
    checkpoint, index = tiny_checkpoint("qwen3_vl"), tmp_path / "media.arrow"
    two_ranks.train(words(checkpoint, long_rows, tmp_path / "two", index, train__grad_accumulation=1, **options))
    Run(recipe_of(words(checkpoint, long_rows, tmp_path / "one", index, **options))).train()
    one, other = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for name in ("evs/video_tokens_after", "evs/supervised_tokens", "data/shortened"):
        assert [line[name] for line in one] == [line[name] for line in other]
    assert_only_rounding(one, other)


def test_a_file_that_changed_is_not_shown(recipe: Callable[..., Recipe], long_rows: Path, tmp_path: Path) -> None:
    """What was planned for it may not hold, so another row stands in, which is no longer than the plan."""
    for file in long_rows.parent.iterdir():
        shutil.copy(file, tmp_path / file.name)
    run = Inputs(recipe(rows=tmp_path / "rows.json", train__epochs=3))
    assert run.schedule.num_steps
    write_video(tmp_path / "7.mp4", range(0, 3600, 100))
    replaced = 0
    for number in range(len(run.stream)):
        for slot, example in zip(run.schedule.batch(number).slots, run.stream[number].rows, strict=True):
            assert isinstance(example, Example)
            assert example.sample_id != "v7"
            for bad in example.bad:
                assert bad.reason in ("changed", "too long")
            replaced += any(bad.reason == "changed" for bad in example.bad)
            (tokens,) = run.collator.plan([example], run.stream[number].step).num_tokens
            assert tokens <= slot.num_tokens
            assert bool(example.bad) or tokens == slot.num_tokens
    assert replaced >= 2


def test_a_folder_that_cannot_be_written_costs_time_only(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    options = {"data__index": tmp_path / "file" / "media.arrow"}
    run = Inputs(recipe(**options))
    assert run.plan(0) == Inputs(recipe()).plan(0)
    assert not index_file(run.recipe.data).exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"train__batch_size": 2}, "set train.batch_size"),
        ({"data__max_tokens_per_batch": None, "data__max_media_tokens_per_batch": 5}, "needs max_tokens_per_batch"),
    ],
)
def test_contradictions_are_refused(recipe: Callable[..., Recipe], options: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        recipe(**options)
