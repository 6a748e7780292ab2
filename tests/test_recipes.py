"""The shipped recipes, executed: the real ones against tiny checkpoints on the CPU.

Each takes one step in this process; one of each kind runs as two processes with its own DeepSpeed mode, and exports.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from evs_train.config import Recipe
from evs_train.models import FAMILIES
from evs_train.recipe import RECIPES_DIR, load_recipe, recipe_names
from evs_train.uptrain import Run
from tests.runs import metrics, torchrun

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
DEMOS = {"tiny": "qwen3_vl", "tiny_nemotron": "nemotron_h_omni"}
FAMILY_OF = {
    "nemotron": "nemotron_h_omni",
    "qwen3_vl_8b": "qwen3_vl",
    "qwen3_vl_30b_a3b": "qwen3_vl_moe",
    "qwen2_5_vl_7b": "qwen2_5_vl",
    "qwen3_5_9b": "qwen3_5",
    "glm4_1v_9b": "glm4v",
    "glm4_6v_flash": "glm46v",  # its config.json says glm4v; the processor is GLM-4.6V's
    "llava_onevision_7b": "llava_onevision",
    "video_llama_3_7b": "video_llama_3",
    "internvl3_8b": "internvl",
}
TWO_PROCESSES = ["nemotron", "qwen3_vl_8b"]  # one for each kind of tuning and DeepSpeed mode
HEADER = re.compile(r"# Uptrains .+\n(?:#.+\n)*# Hardware: (?:.+\n)(?:#.+\n)*# Run: torchrun (.+)\n(?:#.+\n)*(?=[a-z])")


def loaded() -> dict[str, Recipe]:
    """The recipes of released models."""
    return {name: load_recipe([f"recipe={name}"]) for name in FAMILY_OF}


def overrides(recipe: str, tiny_checkpoint: Callable[[str], Path], rows: Path, folder: Path) -> list[str]:
    """The recipe with names that exist here, and nothing else changed."""
    return [
        f"recipe={recipe}",
        f"model.path={tiny_checkpoint(FAMILY_OF[recipe])}",
        f"data.rows={rows}",
        f"output_dir={folder / 'run'}",
    ]


def test_every_recipe_is_executed() -> None:
    assert sorted([*DEMOS, *FAMILY_OF]) == recipe_names()


def test_every_family_has_a_recipe() -> None:
    assert set(FAMILY_OF.values()) == set(FAMILIES)


def test_readme_lists_the_recipes_with_their_models() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\S+/\S+)` \|", README, re.MULTILINE)
    assert sorted(rows) == sorted((name, recipe.model.path) for name, recipe in loaded().items())


def test_two_processes_run_every_kind_of_recipe() -> None:
    kinds = {name: (recipe.tuning.method, recipe.deepspeed) for name, recipe in loaded().items()}
    assert {kinds[name] for name in TWO_PROCESSES} == set(kinds.values())


def test_headers_say_what_to_run() -> None:
    for name, recipe in loaded().items():
        text = (RECIPES_DIR / f"{name}.yaml").read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 60
        header = HEADER.match(text)
        assert header, name
        words = shlex.split(header[1])
        assert load_recipe(words[words.index("launch/uptrain.py") + 1 :]).recipe == name
        assert "not measured yet" in re.sub(r"\n# ", " ", header[0])
        assert recipe.model.path.count("/") == 1  # a name on the hub
        assert recipe.output_dir == f"runs/{name}"


@pytest.mark.parametrize("recipe", FAMILY_OF)
def test_real_recipe_takes_a_step(
    recipe: str, tiny_checkpoint: Callable[[str], Path], mixed_rows: Path, tmp_path: Path
) -> None:
    """In this process, without DeepSpeed: every row shape through processor and template, and one optimizer step."""
    words = overrides(recipe, tiny_checkpoint, mixed_rows, tmp_path)
    words += ["data.fps=8"]  # the clips last 1.5 seconds
    words += ["deepspeed=null", "tracking.wandb=false", "data.num_workers=0", "train.pictures_every=null"]
    words += ["train.steps=1", "train.grad_accumulation=5", "seed=1"]  # with 0 it is a dense step
    run = Run(load_recipe(words))
    summary = run.train()
    assert math.isfinite(summary.last_loss)
    assert summary.video_tokens_after < summary.video_tokens_before
    (line,) = metrics(tmp_path / "run")
    assert line["grad_norm"] > 0


@pytest.mark.parametrize("recipe", TWO_PROCESSES)
def test_real_recipe_runs_on_two_cpu_processes(
    recipe: str, tiny_checkpoint: Callable[[str], Path], mixed_rows: Path, tmp_path: Path
) -> None:
    """Nothing of the recipe is changed but names and length: bfloat16, LoRA, ZeRO-3, checkpointing all run."""
    words = [
        *overrides(recipe, tiny_checkpoint, mixed_rows, tmp_path),
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
    assert config["video_pruning_rate"] == loaded()[recipe].export.rate
    assert "vllm serve" in done.stdout
    assert list((tmp_path / "run" / "pictures").glob("*.png"))


@pytest.mark.parametrize("recipe", DEMOS)
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
