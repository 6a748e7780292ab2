"""`evs.method` from the recipe to training, the export, generation and evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evs_train.errors import RecipeError
from evs_train.evaluate.options import parse_options
from evs_train.evaluate.records import read_records
from evs_train.evaluate.report import recommended_rate
from evs_train.evaluate.run import evaluate, name_of_side
from evs_train.export import export_run
from evs_train.generation import PrunedModel
from evs_train.models.tiny import build_tiny
from evs_train.pruners.random_tokens import RandomTokens
from evs_train.pruners.whole_units import WholeUnits
from evs_train.recipe import load_recipe
from evs_train.serving import launch_lines
from evs_train.uptrain import Run
from tests.runs import arguments, metrics, recipe_of


@pytest.fixture(scope="module")
def run(
    tiny_checkpoint: Callable[[str], Path], world: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Folder of a finished run with a method."""
    runs: dict[str, Path] = {}

    def of(method: str) -> Path:
        if method not in runs:
            runs[method] = tmp_path_factory.mktemp(method)
            settings = {"evs__method": method, "evs__rate": 0.5, "train__steps": 2, "train__batch_size": 2}
            Run(recipe_of(arguments(tiny_checkpoint("qwen3_vl"), world, runs[method], **settings))).train()
        return runs[method]

    return of


def test_methods_train_on_as_many_other_tokens(run: Callable[[str], Path]) -> None:
    lines = {method: metrics(run(method)) for method in ("evs", "random", "frames")}
    counts = {method: [line["evs/video_tokens_after"] for line in of] for method, of in lines.items()}
    assert counts["evs"] == counts["random"] == counts["frames"]
    assert len({of[0]["loss"] for of in lines.values()}) == 3


def test_an_export_says_its_method_and_generation_follows_it(run: Callable[[str], Path]) -> None:
    export = export_run(run("random"), rate=0.6)
    assert "video_pruning_rate" not in json.loads((export.path / "config.json").read_text())
    loaded = PrunedModel.load(export.path, dtype="float32", device="cpu")
    assert loaded.pruner == RandomTokens()
    assert loaded.trained_rate == 0.6
    assert PrunedModel.load(export.path, method="frames", encoder_only=True).pruner == WholeUnits()
    assert {line.reads for line in export.serving} == {"unsupported"}
    card = (export.path / "README.md").read_text()
    assert '`evs.method: "random"`' in card
    assert "`config.json` does not say it" in card


def test_a_rate_of_the_base_is_not_left_for_engines(
    tiny_checkpoint: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    base = build_tiny("nemotron_h_omni", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "video_pruning_rate": 0.7}))
    settings = {"evs__method": "frames", "train__steps": 1, "train__batch_size": 1}
    Run(recipe_of(arguments(base, world, tmp_path / "run", **settings))).train()
    assert json.loads((export_run(tmp_path / "run").path / "config.json").read_text())["video_pruning_rate"] == 0.0


def test_which_engine_knows_which_method() -> None:
    reads = {line.engine: line for line in launch_lines("qwen3_vl", "org/model", 0.5, "vidcom2")}
    assert reads["vLLM"].command == "vllm serve org/model --video-pruning-method vidcom2 --video-pruning-rate 0.5"
    assert reads["SGLang"].reads == "unsupported"
    for family, method in (("qwen2_5_vl", "vidcom2"), ("qwen3_vl", "random"), ("nemotron_h_omni", "frames")):
        lines = launch_lines(family, "org/model", 0.5, method)
        assert {line.reads for line in lines} == {"unsupported"}
        assert not any("0.5" in line.command for line in lines)


def test_methods_are_the_sides_of_an_evaluation(run: Callable[[str], Path], tmp_path: Path, world: Path) -> None:
    export = export_run(run("evs"), rate=0.5, out=tmp_path / "export").path
    rows = tmp_path / "rows.jsonl"
    videos = [str(world.parent / "clips" / f"{number:06d}.mp4") for number in range(3)]
    asked = {"question": "What moves?", "options": ["A circle.", "A square."], "answer": 0}
    rows.write_text("".join(json.dumps({"id": video, "video": video, **asked}) + "\n" for video in videos))

    def evaluated(out: str, **keys: Any) -> dict[str, Any]:
        given = {
            "model": str(export),
            "data": str(rows),
            "out": str(tmp_path / out),
            "rates": [0.5],
            "timed": 0,
            **keys,
        }
        words = [f"{key}={json.dumps(value) if isinstance(value, list) else value}" for key, value in given.items()]
        results = evaluate(parse_options([*words, "fps=8", "dtype=float32", "device=cpu"]))
        assert results is not None
        return results

    both = evaluated("both", methods=["evs", "random", "frames"])
    assert [model["name"].rsplit(", ", 1)[1] for model in both["models"]] == ["evs", "random", "frames"]
    assert [model["method"] for model in both["models"]] == ["evs", "random", "frames"]
    assert [(one["model"], one["rate"]) for one in both["comparisons"]] == [(1, 0.0), (1, 0.5), (2, 0.0), (2, 0.5)]
    kept = [[point["retained_tokens"] for point in model["points"]] for model in both["models"]]
    assert kept[0] == kept[1] == kept[2]
    scores = {(one.model, one.question, one.rate): one.scores for one in read_records(tmp_path / "both")}
    for video in videos:
        assert scores[0, video, 0.0] == scores[1, video, 0.0] == scores[2, video, 0.0]
        assert len({tuple(scores[place, video, 0.5]) for place in range(3)}) == 3
    assert [one["points"] for one in evaluated("own")["models"]] == [both["models"][0]["points"]]
    with pytest.raises(RecipeError, match="methods"):
        evaluated("both", methods=["evs", "frames"])

    results = json.loads((tmp_path / "both" / "results.json").read_text())
    results["models"][0] |= {"recommended": 0.5}
    results["models"][1] |= {"recommended": 0.9}
    (tmp_path / "both" / "results.json").write_text(json.dumps(results))
    assert recommended_rate(run("evs"), tmp_path / "both") == 0.5
    results["models"] = results["models"][1:]
    (tmp_path / "both" / "results.json").write_text(json.dumps(results))
    with pytest.raises(RecipeError, match="no curve with the run's own"):
        recommended_rate(run("evs"), tmp_path / "both")


def test_names_of_sides() -> None:
    assert name_of_side("runs/a/export", None) == "a/export"
    assert name_of_side("runs/a/export", "evs") == "a/export, evs"
    assert name_of_side("runs/a/export", {"kind": "random"}) == "a/export, random"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=a", "data=b", "methods=[evz]"], "methods: unknown pruner 'evz'"),
        (["model=http://a/v1", "data=b", "rates=[.5]", "methods=[evs]"], "a server prunes in its own way"),
    ],
)
def test_methods_that_cannot_be_compared(words: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_options(words)


def test_a_recipe_is_told_of_unknown_methods_with_its_other_faults() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(["recipe=tiny", "evs.method=evz", "evs.rate=2"])
    assert "did you mean evs" in str(caught.value)
    assert "evs.rate" in str(caught.value)
