"""`data.cache_features`: the run without it, to the bit, whatever is found and whatever is computed."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from evs_train import cli
from evs_train.check import check
from evs_train.config import Recipe
from evs_train.data import rows as data_rows
from evs_train.data.features import FeatureStore
from evs_train.data.index import Entry, Fault, MediaIndex, state_of
from evs_train.encoder_cache import COUNTS, open_store
from evs_train.errors import MediaError, RecipeError
from evs_train.models import FAMILIES
from evs_train.models.loading import load_weights
from evs_train.prune import EvsHook
from evs_train.uptrain import Run
from tests.runs import arguments, metrics, recipe_of

UNIFORM = {"kind": "uniform", "min": 0.0, "max": 0.9}
FROZEN: dict[str, Any] = {"tuning__freeze": ["vision"], "optim__lr_by_part": {}}
LORA: dict[str, Any] = {"tuning__method": "lora", "tuning__lora__targets": ["q_proj", "linear_fc1"]}
GRIDS = ["image_pieces", "video_grid_thw", "video_pieces"]
NUM_FILES = 5
"""Of `mixed_rows`: three rows have videos, one of them two; one has an image, and so has one of those."""


@pytest.fixture
def recipe(tiny_checkpoint: Callable[[str], Path], mixed_rows: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe of two passes over the rows with a frozen tower; `cached` keeps what it says."""

    def make(name: str, family: str = "qwen3_vl", *, cached: bool = True, **overrides: Any) -> Recipe:
        cache = {"path": str(tmp_path / "cache"), "max_gib": 1} if cached else None
        settings = {"train__steps": 5, "train__batch_size": 2, "evs__rate": UNIFORM, **FROZEN}
        settings |= {"data__cache_features": cache, "data__index": tmp_path / "media.arrow", **overrides}
        return recipe_of(arguments(tiny_checkpoint(family), mixed_rows, tmp_path / name, **settings))

    return make


def train(recipe: Recipe) -> list[dict[str, Any]]:
    Run(recipe).train()
    return metrics(Path(recipe.output_dir))


def curve(lines: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What a step computes: losses by rate and gradient norm, as they were written."""
    return [
        {name: value for name, value in line.items() if name.startswith(("loss", "grad", "evs/"))} for line in lines
    ]


def total(lines: list[dict[str, Any]], name: str) -> float:
    return float(sum(line[f"data/feature_cache_{name}"] for line in lines))


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("*/*/*.safetensors"))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One element for each medium that is decoded."""
    found: list[int] = []
    read_video, read_image = data_rows.read_video, data_rows.read_image

    def watched(read: Callable[..., Any]) -> Callable[..., Any]:
        def reading(*args: Any, **options: Any) -> Any:
            found.append(1)
            return read(*args, **options)

        return reading

    monkeypatch.setattr(data_rows, "read_video", watched(read_video))
    monkeypatch.setattr(data_rows, "read_image", watched(read_image))
    return found


def test_both_epochs_are_those_of_a_run_without_it(
    family_name: str, recipe: Callable[..., Recipe], decoded: list[int], tmp_path: Path
) -> None:
    plain = train(recipe("plain", family_name, cached=False))
    assert not any("feature_cache" in name for name in plain[0])
    decoded.clear()
    cached = recipe("cached", family_name)
    lines = train(cached)
    assert curve(lines) == curve(plain)
    assert total(lines, "misses") == len(decoded) >= NUM_FILES
    assert total(lines, "hits") > 0 < total(lines, "bytes_read")
    assert lines[-1]["data/feature_cache_misses"] == total(lines, "not_written") == 0
    written = sum(file.stat().st_size for file in entries(tmp_path))
    assert total(lines, "bytes_written") == written > 0
    estimate = check(Run(cached), num_workers=0).feature_cache_gib
    assert estimate is not None
    assert estimate * 2**30 == pytest.approx(written - 2000 * len(entries(tmp_path)), rel=0.1)  # without headers


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_onevision"])
def test_behind_a_frozen_projector_nothing_is_left_to_run(
    family: str, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Adapters on the language model alone: what is kept is what that reads, to the bit."""
    options = {"tuning__method": "lora"}
    plain = train(recipe("plain", family, cached=False, **options))
    first = recipe("first", family, **options)
    assert curve(train(first)) == curve(plain)
    run = Run(recipe("second", family, **options))
    trainer = run.build_trainer()
    modules = [*trainer.hook.family.entries(trainer.hook.model)]
    for module in modules:
        module.register_forward_pre_hook(lambda *_: pytest.fail("the projector runs"))
    trainer.train()
    lines = metrics(tmp_path / "second")
    assert curve(lines) == curve(plain)
    assert (total(lines, "misses"), total(lines, "hits") > 0) == (0, True)
    estimate = check(Run(first), num_workers=0).feature_cache_gib
    assert estimate is not None
    written = sum(file.stat().st_size for file in entries(tmp_path))
    assert estimate * 2**30 == pytest.approx(written - 2000 * len(entries(tmp_path)), rel=0.1)  # without headers


@pytest.mark.parametrize("family", ["llava_onevision", "nemotron_h_omni", "internvl"])
def test_images_that_stand_together(
    family: str, recipe: Callable[..., Recipe], mixed_rows: Path, tmp_path: Path
) -> None:
    """LLaVA-OneVision cuts an image into tiles only if it stands alone, so the same file is two entries."""
    photo, other = mixed_rows.parent / "photo.png", tmp_path / "other.png"
    Image.open(photo).transpose(Image.Transpose.ROTATE_90).save(other)
    answer = {"from": "gpt", "value": "Noise."}
    rows = [
        {"image": [str(photo), str(other)], "conversations": [{"from": "human", "value": "<image><image>"}, answer]},
        {"image": str(photo), "conversations": [{"from": "human", "value": "<image>"}, answer]},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    options = {"data__rows": tmp_path / "rows.json", "train__steps": 3}
    plain = train(recipe("plain", family, cached=False, **options))
    first, second = (train(recipe(name, family, **options)) for name in ("first", "second"))
    assert curve(first) == curve(second) == curve(plain)
    assert (len(entries(tmp_path)), total(second, "misses"), total(second, "hits")) == (3, 0, 9)


def test_other_rates_use_the_same_entries(recipe: Callable[..., Recipe], decoded: list[int], tmp_path: Path) -> None:
    """A run at another rate decodes nothing, and the tower is not run."""
    first = train(recipe("first"))
    plain = train(recipe("plain", cached=False, evs__rate=0.3))
    decoded.clear()
    second = train(recipe("second", evs__rate=0.3))
    assert curve(second) == curve(plain) != curve(first)
    assert (decoded, total(second, "misses"), total(second, "bytes_written")) == ([], 0, 0)
    assert total(second, "hits") == total(first, "hits") + total(first, "misses")
    assert all(line["data/decoded/decord"] == 0 for line in second)


@pytest.mark.parametrize(
    "options",
    [
        {"model__dtype": "bfloat16"},
        {**LORA, "tuning__lora__parts": ["language_model", "projector"], "model__dtype": "bfloat16"},
        {"tuning__freeze": ["vision", "projector"]},
        {"train__packing": True, "train__grad_accumulation": 2},
        {"train__gradient_checkpointing": True},
        {"objective__kind": "teacher"},
        {"objective__kind": "sandwich"},
    ],
    ids=["autocast", "lora", "projector frozen", "packed", "checkpointing", "teacher", "sandwich"],
)
def test_it_changes_nothing_in_any_kind_of_run(
    options: dict[str, Any], recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    plain = train(recipe("plain", cached=False, **options))
    lines = train(recipe("cached", **options))
    assert curve(lines) == curve(plain)
    assert total(lines, "misses") > 0 < total(lines, "hits")
    dtypes = {dtype_of(file) for file in entries(tmp_path)}
    assert dtypes == {torch.bfloat16 if "model__dtype" in options else torch.float32}


@pytest.mark.parametrize(
    "options",
    [
        {"data__num_workers": 1},
        {"data__max_tokens_per_batch": 150, "train__batch_size": 1, "data__min_frames": 2},
    ],
    ids=["worker", "budget"],
)
def test_rows_that_workers_read_or_that_lose_frames(options: dict[str, Any], recipe: Callable[..., Recipe]) -> None:
    plain = train(recipe("plain", cached=False, **options))
    first, second = (train(recipe(name, **options)) for name in ("first", "second"))
    assert curve(first) == curve(second) == curve(plain)
    assert total(second, "misses") == 0 < total(second, "hits")
    if "data__max_tokens_per_batch" in options:
        assert any(line["data/shortened"] for line in second)


def dtype_of(file: Path) -> torch.dtype:
    return load_file(file)["0"].dtype


def test_what_is_damaged_is_computed_again(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    first = train(recipe("first"))
    whole = {file: {name: one.clone() for name, one in load_file(file).items()} for file in entries(tmp_path)}
    torn, flipped, *_ = whole
    torn.write_bytes(torn.read_bytes()[:-9])
    content = flipped.read_bytes()
    flipped.write_bytes(content[:-1] + bytes([content[-1] ^ 16]))
    second = train(recipe("second"))
    assert curve(second) == curve(first)
    assert total(second, "misses") >= 2
    assert entries(tmp_path) == list(whole)
    assert all(torch.equal(one, whole[file][name]) for file in whole for name, one in load_file(file).items())


def test_a_full_cache_keeps_what_it_has(
    recipe: Callable[..., Recipe], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = train(recipe("plain", cached=False))
    section = {"path": str(tmp_path / "cache"), "max_gib": 600_000 / 2**30}
    first = train(recipe("first", data__cache_features=section))
    assert 0 < sum(file.stat().st_size for file in entries(tmp_path)) <= 600_000
    assert 0 < len(entries(tmp_path)) < NUM_FILES
    assert total(first, "not_written") > 0
    assert "is full" in caplog.text
    kept = entries(tmp_path)
    second = train(recipe("second", data__cache_features=section))
    assert entries(tmp_path) == kept
    assert total(second, "misses") > 0 < total(second, "hits")
    assert curve(first) == curve(second) == curve(plain)


def test_a_disk_that_fails_costs_time_and_nothing_else(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = train(recipe("plain", cached=False))
    run = Run(recipe("first"))
    build = run.build_trainer

    def build_and_lose_the_folder(*args: Any) -> Any:
        trainer = build(*args)
        shutil.rmtree(tmp_path / "cache")
        return trainer

    monkeypatch.setattr(run, "build_trainer", build_and_lose_the_folder)
    run.train()
    lines = metrics(tmp_path / "first")
    assert curve(lines) == curve(plain)
    assert total(lines, "hits") == total(lines, "bytes_written") == 0 < total(lines, "not_written")
    assert "cannot be written" in caplog.text


def test_a_defect_of_the_writer_ends_the_run(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(FeatureStore, "write", fails)
    with pytest.raises(ZeroDivisionError):
        train(recipe("first"))


def test_a_run_ends_when_everything_is_written(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = FeatureStore.write

    def slowly(*args: Any) -> int | None:
        time.sleep(1)
        return write(*args)

    monkeypatch.setattr(FeatureStore, "write", slowly)
    train(recipe("first", train__steps=1, train__batch_size=5))
    assert len(entries(tmp_path)) == NUM_FILES


def settings(recipe: Recipe, change: Callable[[nn.Module], None] = lambda model: None) -> str:
    run = Run(recipe)
    model = load_weights(recipe.model, run.family.config, torch.float32)
    change(model)
    return open_store(recipe, run.family, model).settings


def test_other_weights_or_settings_are_another_folder(recipe: Callable[..., Recipe]) -> None:
    def of_part(name: str) -> Callable[[nn.Module], None]:
        def nudge(model: nn.Module) -> None:
            parameter = model.get_parameter(name)
            with torch.no_grad():
                parameter.view(-1)[-1] += 1e-3

        return nudge

    plain = settings(recipe("run"))
    same = {
        "again": settings(recipe("run")),
        "rate": settings(recipe("run", evs__rate=0.1, seed=3, optim__lr=1e-4)),
        "projector": settings(recipe("run"), of_part("model.visual.merger.linear_fc1.weight")),
        "language model": settings(recipe("run"), of_part("lm_head.weight")),
    }
    assert set(same.values()) == {plain}
    frozen = {"tuning__freeze": ["vision", "projector"]}
    different = {
        "frozen projector": settings(recipe("run", **frozen)),
        "its weights": settings(recipe("run", **frozen), of_part("model.visual.merger.linear_fc1.weight")),
        "weights": settings(recipe("run"), of_part("model.visual.blocks.1.mlp.linear_fc2.bias")),
        "positions": settings(recipe("run"), of_part("model.visual.pos_embed.weight")),
        "dtype": settings(recipe("run", model__dtype="bfloat16")),
        "attention": settings(recipe("run", model__attn_implementation="eager")),
        "processor": settings(recipe("run", data__video_kwargs={"do_rescale": False})),
        "images": settings(recipe("run", data__image_kwargs={"do_rescale": False})),
        "decoder": settings(recipe("run", data__backend="pyav")),
        "unverified": settings(recipe("run", data__verify=False)),
        "limit": settings(recipe("run", data__max_pixels=10_000)),
        "family": settings(recipe("run", "qwen3_vl_moe")),
    }
    adapters = recipe("run", tuning__method="lora")
    assert settings(adapters) == settings(adapters, of_part("lm_head.weight")) == different["frozen projector"]
    assert len({plain, *different.values()}) == 1 + len(different), different


def test_a_file_that_changed_is_read_again(recipe: Callable[..., Recipe], mixed_rows: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(mixed_rows.parent, folder)
    options = {"data__rows": folder / "rows.json", "data__verify": False}
    train(recipe("first", **options))
    shutil.copy(folder / "wide.mp4", folder / "still.mp4")
    os.utime(folder / "still.mp4", (5, 5))
    plain = train(recipe("plain", cached=False, **options))
    second = train(recipe("second", **options))
    assert curve(second) == curve(plain)
    assert total(second, "misses") > 0 < total(second, "hits")


def test_a_file_that_is_gone_or_known_to_be_bad_is_refused(
    recipe: Callable[..., Recipe], mixed_rows: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(mixed_rows.parent, folder)
    run = Run(recipe("run", data__rows=folder / "rows.json"))
    run.build_trainer()
    number = next(number for number, sample in enumerate(run.samples) if sample.id == "still")
    new = run.reader.read(number).media
    assert (sorted(new), sorted(new["video_pieces"][0])) == (GRIDS, ["facts", "inputs", "key"])
    run.train()
    found = run.reader.read(number).media
    assert (sorted(found), sorted(found["video_pieces"][0])) == (GRIDS, ["key", "outputs"])
    state = state_of(str(folder / "still.mp4"))
    assert state is not None
    run.reader.index.entries[str(folder / "still.mp4")] = Entry(*state, fault=Fault("it is bad", "", "damaged"))
    with pytest.raises(MediaError, match="it is bad"):
        run.reader.read(number)
    run.reader = dataclasses.replace(run.reader, index=MediaIndex(), _bad_files={})
    (folder / "still.mp4").unlink()
    with pytest.raises(MediaError) as refused:
        run.reader.read(number)
    assert refused.value.reason == "missing"


def test_pictures_are_drawn_from_decoded_frames(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    train(recipe("first"))
    plain = train(recipe("plain", cached=False, train__pictures_every=1))
    second = train(recipe("second", train__pictures_every=1))
    assert curve(second) == curve(plain)
    drawn = [sorted(file.name for file in (tmp_path / name / "pictures").iterdir()) for name in ("plain", "second")]
    assert drawn[0] == drawn[1] != []


def test_evaluation_while_training_is_as_without_it(recipe: Callable[..., Recipe], tmp_path: Path, world: Path) -> None:
    rows = [json.loads(line) for line in world.read_text(encoding="utf-8").splitlines()]
    video = next(row["video"] for row in rows if "video" in row)
    question = {
        "id": "q",
        "video": str(world.parent / video),
        "question": "What?",
        "options": ["a", "b"],
        "answer": "A",
    }
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n", encoding="utf-8")
    options = {"eval__every": 3, "eval__data": str(tmp_path / "questions.jsonl"), "eval__rates": [0.0, 0.5]}
    plain, cached = (train(recipe(name, cached=name != "plain", **options)) for name in ("plain", "cached"))
    assert curve(cached) == curve(plain)
    found = [
        list(map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines()))
        for name in ("plain", "cached")
    ]
    accuracies = [
        [{name: value for name, value in line.items() if name.startswith("eval/")} for line in lines] for lines in found
    ]
    assert accuracies[0] == accuracies[1]
    assert any(accuracies[0])


@pytest.mark.parametrize(
    "options",
    [{"tuning__freeze": []}, {"tuning__method": "lora", "tuning__lora__parts": ["vision", "language_model"]}],
    ids=["trained", "adapted"],
)
def test_a_tower_that_moves_is_refused(options: dict[str, Any], recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match=r"cache_features needs a frozen vision tower"):
        recipe("run", **options)
    recipe("run", cached=False, **options)


def test_a_tower_that_drops_at_random_is_refused(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    plain = recipe("run", "internvl")
    folder = shutil.copytree(plain.model.path, tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["vision_config"]["hidden_dropout_prob"] = 0.1
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"hidden_dropout_prob.*0\.1.*not the same twice"):
        Run(recipe("run", "internvl", model__path=folder))
    Run(recipe("run", "internvl", model__path=folder, cached=False))


def test_a_family_without_halves_is_refused(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FAMILIES["qwen3_vl"], "projector_entries", ())
    with pytest.raises(RecipeError, match=r"cache_features is not possible with qwen3_vl"):
        Run(recipe("run"))


def test_a_folder_that_cannot_be_written_is_refused(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"cache_features\.path: .*file/cache cannot be written"):
        Run(recipe("run", data__cache_features={"path": str(tmp_path / "file" / "cache")})).train()


def test_check_says_how_much_disk_it_takes(
    recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """How right that is: `test_both_epochs_are_those_of_a_run_without_it`."""
    checkpoint, (rows,) = recipe("run").model.path, recipe("run").data.rows
    words = arguments(Path(checkpoint), Path(rows), tmp_path / "run", **FROZEN)
    assert cli.main(["check", *words]) == 0
    assert "data.cache_features" in capsys.readouterr().out
    assert cli.main(["check", *words, "tuning.freeze=[]"]) == 0
    assert "data.cache_features" not in capsys.readouterr().out


def test_without_media_on_a_rank_the_projector_still_has_gradients(recipe: Callable[..., Recipe]) -> None:
    """A rank whose batch has text alone projects a blank, or other ranks would wait for its gradients."""
    run = Run(recipe("run"))
    trainer = run.build_trainer()
    hook: EvsHook = trainer.hook
    assert hook.cache is not None
    number = next(n for n, sample in enumerate(run.samples) if not sample.videos and not sample.images)
    encoded, blanks = hook.cache.encode(run.reader.read(number).media, training=True)
    assert encoded == {"image": [], "video": []}
    assert [layer.shape[0] for _, layers in blanks for layer in layers] == [0, 0, 0]
    sum(layer.sum() for _, layers in blanks for layer in layers).backward()  # type: ignore[union-attr]
    visual = hook.model.model.visual  # type: ignore[union-attr]
    trained = [*visual.merger.parameters(), *visual.deepstack_merger_list.parameters()]
    assert all(p.grad is not None and not p.grad.any() for p in trained)
    assert hook.cache.encode(run.reader.read(number).media, training=False)[1] == []


def test_counts_are_since_the_last_log(recipe: Callable[..., Recipe]) -> None:
    first = train(recipe("first", train__log_every=2))
    assert [line["step"] for line in first] == [1, 2, 4, 5]
    assert all(f"data/feature_cache_{name}" in line for line in first for name in COUNTS)
    every = train(recipe("every"))
    rare = train(recipe("rare", train__log_every=100))
    assert total(every, "hits") == total(rare, "hits")
    assert total(every, "bytes_read") == total(rare, "bytes_read")
