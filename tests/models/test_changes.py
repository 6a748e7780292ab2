"""How pixels change: the same areas and units in every family's layout, carried to the pruner on every way."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evs_train.config import ModelSection
from evs_train.data.chat import MediaItem, Prepared
from evs_train.data.manifest import read_rows
from evs_train.data.rows import RowReader
from evs_train.data.sampling import FrameSampling
from evs_train.data.video import Clip
from evs_train.data_config import DataSection
from evs_train.errors import RecipeError
from evs_train.evaluate.layouts import read_questions
from evs_train.evaluate.local import LocalModel
from evs_train.evaluate.options import EvalOptions
from evs_train.generation import PrunedModel
from evs_train.inspection.observe import observe
from evs_train.models.base import Family
from evs_train.models.changes import of_frames, of_patches
from evs_train.models.loading import load_family
from evs_train.prune import EvsHook
from evs_train.pruners.base import Video
from evs_train.pruners.nvidia import Nvidia
from evs_train.uptrain import Run
from tests.parity.conftest import fresh
from tests.parity.rig import Rig
from tests.runs import arguments, metrics, recipe_of

PIXELS = Nvidia(level="pixels")
NUM_FRAMES, TURNS_WHITE = 7, 4


@pytest.fixture
def family(family_name: str, tiny_checkpoint: Callable[[str], Path]) -> Family:
    return load_family(ModelSection(path=str(tiny_checkpoint(family_name))), DataSection(rows="unused.json"))


@pytest.fixture
def rig(family_name: str, tiny_checkpoint: Callable[[str], Path], mixed_rows: Path) -> Rig:
    return measured(fresh(family_name, tiny_checkpoint, mixed_rows), mixed_rows)


def measured(rig: Rig, rows: Path) -> Rig:
    """The same rig with the changes of pixels in its examples."""
    samples = read_rows([rows])
    reader = RowReader(samples, rig.family, FrameSampling(fps=8.0), measure_changes=True)
    examples = {sample.id: dataclasses.replace(reader.read(n), draw=n) for n, sample in enumerate(samples)}
    other = Rig.__new__(Rig)
    vars(other).update({**vars(rig), "examples": examples})
    return other


def clip() -> Clip:
    """Grey, but for the upper right quarter, which turns white. An odd number of frames: units of two are filled up."""
    frames = np.full((NUM_FRAMES, 64, 96, 3), 100, dtype=np.uint8)
    frames[TURNS_WHITE:, :32, 48:] = 255
    times = np.arange(NUM_FRAMES) / 2
    return Clip(frames, list(range(NUM_FRAMES)), 2.0, times, NUM_FRAMES, NUM_FRAMES / 2, "clip.mp4")


def test_what_changes_is_found_where_and_when_it_does(family: Family) -> None:
    still = dataclasses.replace(clip(), frames=np.full((NUM_FRAMES, 64, 96, 3), 100, dtype=np.uint8))
    token = family.processor.video_token
    prepared = family.prepare(f"{token}\n{token}\n", [still, clip()], [])
    nothing, change = family.changes(prepared)
    assert not nothing.any()
    item = prepared.items[1]
    assert change.shape == (item.num_units, item.tokens_per_unit)
    assert change.dtype == torch.float32
    turned = TURNS_WHITE // -(-NUM_FRAMES // item.num_units)
    assert not change[torch.arange(item.num_units) != turned].any()
    grid = change[turned].view(item.height, item.width) / change.max()
    above, right = item.height // 2, -(-item.width // 2)
    assert float(grid[:above, right:].min()) > 0.6, "its border tokens may share pixels with their neighbours"
    assert float(grid[0, -1]) > 0.99
    assert float(grid[above + 1 :].max()) < 0.05
    assert float(grid[:, : item.width // 2 - 1].max()) < 0.05


def test_frames_are_averaged_over_equal_areas() -> None:
    frames = torch.rand(5, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    item = MediaItem("video", 3, 2, 4)
    prepared = Prepared(torch.empty(0), {"pixel_values_videos": [frames]}, (item,), torch.empty(0))
    (change,) = of_frames(prepared)
    filled = torch.cat([frames, frames[-1:]])
    assert not change[0].any()
    for unit in (1, 2):
        for row in range(2):
            for column in range(4):
                area = (..., slice(3 * row, 3 * row + 3), slice(2 * column, 2 * column + 2))
                now, before = filled[2 * unit : 2 * unit + 2][area], filled[2 * unit - 2 : 2 * unit][area]
                expected = float((now - before).abs().mean())
                assert float(change[unit, 4 * row + column]) == pytest.approx(expected, rel=1e-5)


def test_patches_are_averaged_token_by_token() -> None:
    patches = torch.rand(2 * 3 * 4, 5, generator=torch.Generator().manual_seed(0))  # four patches to a token
    prepared = Prepared(torch.empty(0), {}, (MediaItem("video", 2, 1, 3),), torch.empty(0))
    (change,) = of_patches(prepared, [{"pixel_values_videos": patches}])
    for place in range(3):
        now, before = patches[12 + 4 * place : 16 + 4 * place], patches[4 * place : 4 * place + 4]
        assert float(change[1, place]) == pytest.approx(float((now - before).abs().mean()), rel=1e-5)


def test_the_hook_chooses_by_them(rig: Rig) -> None:
    """Several videos and rows, one of a single unit, in one batch and in a further pass."""
    names = ("two", "image", "still", "both", "text")
    batch = rig.batch(names, 0.5, pruner=PIXELS)
    changes = [change for name in names for change in rig.examples[name].changes]
    assert [tuple(change.shape) for change in changes] == [
        (planned.item.num_units, planned.item.tokens_per_unit) for planned in batch["plan"].videos
    ]
    assert "changes" not in rig.batch(names, 0.5)
    expected = [PIXELS.choose(Video(torch.zeros(*change.shape, 2), change=change), 0.5).index for change in changes]
    videos = batch["index"]["video"].split([planned.item.num_tokens for planned in batch["plan"].videos])
    kept = torch.cat([batch["index"]["always"], *(v[e] for v, e in zip(videos, expected, strict=True))])
    with torch.no_grad():
        inputs = EvsHook(rig.family, rig.model, PIXELS).prune(batch)
    places = kept.sort().values
    assert torch.equal(inputs["input_ids"].flatten()[batch["index"]["target"]], batch["input_ids"].flatten()[places])
    if "position_ids" in batch:
        found = inputs["position_ids"].view(len(batch["position_ids"]), -1)[:, batch["index"]["target"]]
        assert torch.equal(found, batch["position_ids"].flatten(1)[:, places])


def test_prompts_questions_and_pictures_have_them(
    tiny_checkpoint: Callable[[str], Path], mixed_rows: Path, tmp_path: Path
) -> None:
    model = PrunedModel.load(
        tiny_checkpoint("qwen3_vl"), dtype="float32", data={"fps": 8.0}, method={"kind": "nvidia", "level": "pixels"}
    )
    video = str(mixed_rows.parent / "wide.mp4")
    parts = [{"type": "video", "video": video}, {"type": "text", "text": "What changes?"}]
    messages = [{"role": "user", "content": parts}]
    prompt = model.prompt(messages)
    (change,) = prompt.changes
    expected = PIXELS.choose(Video(torch.zeros(*change.shape, 2), change=change), 0.5).index
    seen = observe(model, video, [0.5]).kept
    assert np.flatnonzero(seen[0]).tolist() == expected.tolist()
    assert model.inputs(prompt, 0.5)["input_ids"].shape[1] == len(prompt.input_ids) - change.numel() + len(expected)
    assert len(model.generate(prompt, 0.5, max_new_tokens=2)) > 0
    row = {"id": "one", "video": video, "question": "What?", "options": ["A circle.", "A square."], "answer": 0}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    options = EvalOptions(model=["any"], data=[str(tmp_path / "rows.jsonl")], out=str(tmp_path / "out"), timed=0)
    (question,) = read_questions(options)[0]
    dense, pruned = LocalModel(0, model, options).answer(question, [0.0, 0.5])
    assert (dense.retained, pruned.retained) == (change.numel(), len(expected))
    assert dense.scores != pruned.scores


@pytest.mark.parametrize(
    "method", [{"kind": "nvidia", "level": "pixels"}, {"kind": "evs-threshold", "similarity": 0.5}], ids=str
)
def test_a_run_trains(
    method: dict[str, Any], tiny_checkpoint: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    settings = {"train__steps": 2, "train__batch_size": 2, "evs__rate": 0.3, "evs__method": method}
    words = arguments(tiny_checkpoint("qwen3_vl"), world, tmp_path / "run", **settings, objective={"kind": "teacher"})
    run = Run(recipe_of(words))
    run.train()
    for step, line in enumerate(metrics(tmp_path / "run")):
        plan = run.plan_batches(2)[step]
        assert line["evs/video_tokens_after"] == plan.video_tokens_after < plan.video_tokens_before
        seen = line.get("evs/video_tokens_seen")
        if run.pruner.hides:
            assert 0 < seen < line["evs/video_tokens_after"]
        else:
            assert seen is None


def test_cached_features_are_refused(tiny_checkpoint: Callable[[str], Path], world: Path, tmp_path: Path) -> None:
    settings = {
        "evs__method": {"kind": "nvidia", "level": "pixels"}, "tuning": {"method": "full", "freeze": ["vision"]},
        "data__cache_features": {"path": str(tmp_path / "cache")},
    }  # fmt: skip
    with pytest.raises(RecipeError, match=r"^data.cache_features: evs.method looks at pixels"):
        Run(recipe_of(arguments(tiny_checkpoint("qwen3_vl"), world, tmp_path, **settings)))
    settings["evs__method"] = "nvidia"
    Run(recipe_of(arguments(tiny_checkpoint("qwen3_vl"), world, tmp_path, **settings)))
