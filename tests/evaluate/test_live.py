"""The curve that is drawn while training: that of `evs-train eval`, without any effect on the training itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evs_train.errors import DataError, RecipeError
from evs_train.evaluate.options import EvalOptions
from evs_train.evaluate.run import evaluate
from evs_train.export import export_run
from evs_train.uptrain import Run
from tests.runs import arguments, metrics, recipe_of, torchrun

RATES = [0.0, 0.5, 0.9]
OPTIONS = ["A red circle.", "A blue square.", "A green triangle."]


@pytest.fixture(scope="module")
def questions(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three questions about each of six clips."""
    file = tmp_path_factory.mktemp("live") / "questions.jsonl"
    lines = []
    for number in range(18):
        video = str(world.parent / "clips" / f"{number % 6:06d}.mp4")
        row = {"question": f"What moves ({number})?", "options": OPTIONS, "answer": (number > 8) + (number > 14)}
        lines.append({"id": str(number), "video": video, **row})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


Words = Callable[..., list[str]]


@pytest.fixture
def words(tiny_checkpoint: Callable[[str], Path], world: Path, questions: Path, tmp_path: Path) -> Words:
    def make(name: str, **options: Any) -> list[str]:
        settings = {
            "eval__every": 2, "eval__data": questions, "eval__rates": RATES, "train__steps": 3, "train__batch_size": 4,
            "optim__lr": 0.01, **options,
        }  # fmt: skip
        return arguments(tiny_checkpoint("qwen3_vl"), world, tmp_path / name, **settings)

    return make


def curves(output: Path) -> dict[int, list[float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {
        line["step"]: [line[f"eval/accuracy/{rate:g}"] for rate in RATES] for line in lines if "eval/accuracy/0" in line
    }


def accuracies(model: Path, questions: Path, out: Path) -> list[float]:
    options = EvalOptions(
        model=[str(model)], data=[str(questions)], rates=RATES, out=str(out), dtype="float32", device="cpu", timed=0,
        num_frames=8,
    )  # fmt: skip
    results = evaluate(options)
    assert results is not None
    lines = [json.loads(line) for file in (out / "records").glob("*.jsonl") for line in file.read_text().splitlines()]
    return [sum(one["correct"] for one in lines if one["rate"] == rate) / 18 for rate in RATES]


def test_the_curve_is_that_of_evs_train_eval(
    words: Words, questions: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Drawn before training, after two steps and after the last; training goes on as without it."""
    Run(recipe_of(words("drawn"))).train()
    Run(recipe_of(words("plain", eval__every=None))).train()
    found = curves(tmp_path / "drawn")
    assert list(found) == [0, 2, 3]
    assert found[0] == accuracies(tiny_checkpoint("qwen3_vl"), questions, tmp_path / "before")
    assert found[3] == accuracies(export_run(tmp_path / "drawn").path, questions, tmp_path / "after")
    assert found[3] != found[0]
    for key in ("loss", "grad_norm"):
        one, other = ([line[key] for line in metrics(tmp_path / name)] for name in ("drawn", "plain"))
        assert one == other, key
    assert not curves(tmp_path / "plain")


def test_adapters_and_bfloat16(words: Words, tmp_path: Path) -> None:
    options = {"tuning__method": "lora", "tuning__lora": {"dropout": 0.1}, "model__dtype": "bfloat16"}
    Run(recipe_of(words("drawn", **options))).train()
    Run(recipe_of(words("plain", eval__every=None, **options))).train()
    assert list(curves(tmp_path / "drawn")) == [0, 2, 3]
    one, other = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("drawn", "plain"))
    assert one == other  # dropout is on again, and draws what it would have drawn


@pytest.mark.parametrize("deepspeed", [pytest.param(None, marks=pytest.mark.exhaustive), "zero3"])
def test_two_processes_draw_the_curve_of_one(words: Words, deepspeed: str | None, tmp_path: Path) -> None:
    """Before training the weights are the same; a process whose share is smaller does not keep the other waiting."""
    options = {"eval__limit": 7, "train__steps": 1}
    Run(recipe_of(words("one", **options))).train()
    done = torchrun(words("two", deepspeed=deepspeed, train__batch_size=2, **options), 2)
    assert done.returncode == 0, done.stderr[-4000:]
    assert list(curves(tmp_path / "two")) == [0, 1]
    assert curves(tmp_path / "two")[0] == curves(tmp_path / "one")[0]


def test_wandb_gets_a_chart(words: Words, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    done = torchrun(words("run", tracking__wandb=True, eval__limit=2, train__steps=2), 1)  # W&B ends with its process
    assert done.returncode == 0, done.stderr[-4000:]
    tables = sorted((tmp_path / "run").glob("wandb/offline-run-*/files/media/table/eval/curve*.json"))
    assert len(tables) == 2
    rows = max((json.loads(table.read_text())["data"] for table in tables), key=len)
    assert {row[1] for row in rows} == {"step 0", "step 2"}
    assert len(rows) == 2 * len(RATES)


def test_what_cannot_be_asked_is_told_before_weights_are_loaded(words: Words, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"id": "1", "question": "What?"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        Run(recipe_of(words("run", eval__data=tmp_path / "empty.jsonl", model__dtype="float32")))
    with pytest.raises(RecipeError, match=r"eval\.every needs eval\.data"):
        recipe_of(words("run", eval__data=[]))
