"""The shipped recipes, executed: the real ones against tiny checkpoints, on the CPU, with their own DeepSpeed mode."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from evs_train.recipe import recipe_names
from tests.runs import metrics, torchrun

FAMILY_OF = {
    "tiny": "qwen3_vl",
    "tiny_nemotron": "nemotron_h_omni",
    "nemotron": "nemotron_h_omni",
    "qwen3_vl_8b": "qwen3_vl",
}


def test_every_recipe_is_executed() -> None:
    assert sorted(FAMILY_OF) == recipe_names()


@pytest.mark.parametrize("recipe", ["nemotron", "qwen3_vl_8b"])
@pytest.mark.xdist_group("distributed")
def test_real_recipe_runs_on_two_cpu_processes(
    recipe: str, tiny_checkpoint: Callable[[str], Path], mixed_rows: Path, tmp_path: Path
) -> None:
    """Nothing of the recipe is changed but names and length: bfloat16, LoRA, ZeRO-3, checkpointing all run."""
    words = [
        f"recipe={recipe}",
        f"model.path={tiny_checkpoint(FAMILY_OF[recipe])}",
        f"data.rows={mixed_rows}",
        f"output_dir={tmp_path / 'run'}",
        "data.num_workers=1",
        "train.steps=2",
        "train.grad_accumulation=2",
        "train.log_every=1",
        "train.pictures_every=1",
    ]
    done = torchrun(words, 2)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(metrics(tmp_path / "run")) == 2
    config = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert config["video_pruning_rate"] == {"nemotron": 0.7, "qwen3_vl_8b": 0.75}[recipe]
    assert "vllm serve" in done.stdout
    assert list((tmp_path / "run" / "pictures").glob("*.png"))


@pytest.mark.parametrize("recipe", ["tiny", "tiny_nemotron"])
def test_demo_recipe_builds_its_inputs_and_a_dry_run_trains_nothing(recipe: str, tmp_path: Path) -> None:
    words = [
        f"recipe={recipe}",
        f"model.path={tmp_path / 'model'}",
        f"data.rows={tmp_path / 'world' / 'train.jsonl'}",
        f"output_dir={tmp_path / 'run'}",
        "demo.num_clips=16",
        "dry_run=true",
    ]
    done = torchrun(words, 1)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "language_model" in done.stdout
    assert "percentiles" in done.stdout
    assert f"output_dir: {tmp_path / 'run'}" in done.stdout
    assert (tmp_path / "model" / "config.json").is_file()
    assert not (tmp_path / "run" / "final").exists()


VIDEOS = Path(__file__).resolve().parents[2] / "shared" / "videos"


@pytest.mark.skipif(not VIDEOS.is_dir(), reason=f"the recorded clips are not there: {VIDEOS}")
def test_recorded_clips_train(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Clips that nobody here made, of several codecs, sizes and rates, in OpenAI-style rows."""
    names = ["flipping_a_pancake.mkv", "nasa_13013.mp4", "av1_video.mkv", "h265_video.mp4", "video_90.mov"]
    rows = tmp_path / "rows.jsonl"
    with rows.open("w") as file:
        for name in names:
            content = [{"type": "video", "video": name}, {"type": "text", "text": "What is this?"}]
            turns = [{"role": "user", "content": content}, {"role": "assistant", "content": f"It is {name}."}]
            file.write(json.dumps({"messages": turns}) + "\n")
    words = [
        "recipe=tiny",
        "demo=null",
        f"model.path={tiny_checkpoint('qwen3_vl')}",
        f"data.rows={rows}",
        f"data.media_root={VIDEOS}",
        "data.fps=2",
        f"output_dir={tmp_path / 'run'}",
        "train.steps=3",
        "train.batch_size=2",
        "train.log_every=1",
        "tracking.wandb=false",
        "evs.rate=0.5",
    ]
    done = torchrun(words, 1)
    assert done.returncode == 0, done.stderr[-4000:]
    first = metrics(tmp_path / "run")[0]
    assert 0 < first["evs/video_tokens_after"] < first["evs/video_tokens_before"]
