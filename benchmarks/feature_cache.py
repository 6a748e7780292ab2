"""What `data.cache_features` gains: an epoch without it, the first one with it (which writes), and the second one.

`OMP_NUM_THREADS=1 python -m benchmarks.feature_cache` writes `benchmarks/results/feature_cache.json` and prints a
table; `--size toy` shows nothing but that it runs. Each side is an epoch of a real run, on rendered clips that an index
knows (so nothing is verified), with one worker. Sides take turns in every round, each round with a cache of its own;
medians over rounds are given with their spread. The three must have the same losses.

Weights are random. In size `small` the encoder takes about half as long again as the rest of a step at rate 0.75, which
is the retained tokens' part of the language model, forward and backward. The second epoch can be at most
(D + V + L) / L times as fast as one without, where D is the waiting for data, V the encoder and L the rest; `limit` is
that, from the sections of the epoch without cache (the projector, which runs every time, is counted in V). Read it
before the seconds: models and machines differ in D, V and L, and a GPU waits for data long before a CPU does.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from benchmarks.environment import environment
from evs_train.check import check
from evs_train.config import Recipe
from evs_train.data.synthetic import write_dataset
from evs_train.models.tiny import build_tiny
from evs_train.recipe import load_recipe
from evs_train.uptrain import Run

RESULTS = Path(__file__).parent / "results" / "feature_cache.json"
ROWS_PER_STEP = 2
SIDES = ("without", "first", "second")
SECTIONS = ("data", "encoder", "rest")


@dataclass(frozen=True)
class Size:
    """Shapes and counts of one benchmark; None leaves the tiny checkpoint's."""

    vision: dict[str, int] | None
    text: dict[str, int] | None
    video_kwargs: dict[str, Any]
    clips: int
    frames: int
    pixels: int
    rounds: int


SIZES = {
    "toy": Size(None, None, {}, clips=6, frames=8, pixels=64, rounds=1),
    "small": Size(
        {"hidden_size": 256, "intermediate_size": 1024, "depth": 6, "num_heads": 4, "out_hidden_size": 512},
        {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8},
        {"size": {"shortest_edge": 2**12, "longest_edge": 2**22}, "cap_pixels_per_frame": False},
        clips=8,
        frames=16,
        pixels=224,
        rounds=3,
    ),
}


def write_checkpoint(folder: Path, size: Size) -> Path:
    """A random Qwen3-VL of these shapes."""
    tiny = build_tiny("qwen3_vl", folder / "tiny")
    if size.vision is None or size.text is None:
        return tiny
    config = AutoConfig.from_pretrained(tiny)
    for section, values in ((config.vision_config, size.vision), (config.text_config, size.text)):
        for name, value in values.items():
            setattr(section, name, value)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder / "model")
    AutoProcessor.from_pretrained(tiny).save_pretrained(folder / "model")
    return folder / "model"


def video_rows(rows: Path) -> Path:
    """Those of the rendered rows that have a video; each clip once."""
    read = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    by_video = {row["video"]: row for row in read if "video" in row}
    kept = rows.with_name("videos.jsonl")
    kept.write_text("".join(json.dumps(row) + "\n" for row in by_video.values()), encoding="utf-8")
    return kept


def recipe_of(checkpoint: Path, rows: Path, output: Path, size: Size, cache: Path | None) -> Recipe:
    """One epoch over the rows."""
    section = None if cache is None else {"path": str(cache)}
    settings: dict[str, Any] = {
        "model.path": str(checkpoint), "demo": None, "data.rows": str(rows), "data.fps": None,
        "data.num_frames": size.frames, "data.num_workers": 1, "data.video_kwargs": size.video_kwargs,
        "data.cache_features": section, "evs.rate": 0.75, "tuning.freeze": ["vision"], "optim.lr_by_part": {},
        "train.steps": None, "train.epochs": 1.0, "train.batch_size": 1, "train.grad_accumulation": ROWS_PER_STEP,
        "train.log_every": 1, "train.pictures_every": None, "tracking.wandb": False, "export.enabled": False,
        "output_dir": str(output),
    }  # fmt: skip
    return load_recipe(["recipe=tiny", *(f"{key}={json.dumps(value)}" for key, value in settings.items())])


def epoch(recipe: Recipe) -> dict[str, Any]:
    """Seconds of an epoch by section, and its losses. The first step, which warms up, does not count."""
    Run(recipe).train()
    lines = (Path(recipe.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [line for line in map(json.loads, lines) if "loss" in line]
    seconds = {name: sum(step[f"time/{name}"] for step in steps[1:]) for name in SECTIONS}
    seconds["all"] = sum(value for step in steps[1:] for name, value in step.items() if name.startswith("time/"))
    return {"seconds": seconds, "losses": [(step["loss"], step["grad_norm"]) for step in steps]}


def measure(size: Size, folder: Path) -> dict[str, Any]:
    """All rounds; see the module."""
    checkpoint = write_checkpoint(folder, size)
    world = write_dataset(folder / "world", num_clips=size.clips, seed=0, size=size.pixels, num_frames=size.frames)
    rows, runs = video_rows(world), folder / "runs"
    report = check(Run(recipe_of(checkpoint, rows, runs, size, folder / "cache")), num_workers=1)
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(size.rounds):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        for side in SIDES:
            shutil.rmtree(runs, ignore_errors=True)
            cache = None if side == "without" else folder / "cache"
            found[side].append(epoch(recipe_of(checkpoint, rows, runs, size, cache)))
    losses = [one["losses"] for of_side in found.values() for one in of_side]
    assert all(one == losses[0] for one in losses), "the losses are not those of the run without cache"
    sides = {side: _spread([one["seconds"] for one in of_side]) for side, of_side in found.items()}
    plain = {name: values["median"] for name, values in sides["without"].items()}
    ratios = [
        [
            one["seconds"]["all"] / second["seconds"]["all"]
            for one, second in zip(found[side], found["second"], strict=True)
        ]
        for side in ("without", "first")
    ]
    files = [file.stat().st_size for file in (folder / "cache").glob("*/*/*.safetensors")]
    return {
        "rows": len(losses[0]) * ROWS_PER_STEP,
        "seconds": sides,
        "second_epoch_is_faster": {
            "than_without": _median_and_range(ratios[0]),
            "than_the_first": _median_and_range(ratios[1]),
            "limit": plain["all"] / (plain["all"] - plain["data"] - plain["encoder"]),
        },
        "disk_mib": sum(files) / 2**20,
        "estimated_mib": (report.feature_cache_gib or 0) * 2**10,
    }


def _spread(seconds: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: _median_and_range([one[name] for one in seconds]) for name in seconds[0]}


def _median_and_range(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="See the head of this file.")
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(words)
    size = SIZES[options.size]
    with tempfile.TemporaryDirectory() as folder:
        found = measure(size, Path(folder))
    print(f"{'seconds of an epoch':22}" + "".join(f"{name:>12}" for name in ("all", *SECTIONS)))
    for side, seconds in found["seconds"].items():
        print(f"{side:22}" + "".join(f"{seconds[name]['median']:12.2f}" for name in ("all", *SECTIONS)))
    faster = found["second_epoch_is_faster"]
    print(
        f"the second is {faster['than_the_first']['median']:.2f} times as fast as the first, "
        f"{faster['than_without']['median']:.2f} times as one without (limit {faster['limit']:.2f}); "
        f"{found['disk_mib']:.1f} MiB on disk, {found['estimated_mib']:.1f} estimated"
    )
    settings = {"size": options.size, **vars(size), "rate": 0.75, "workers": 1, "rows_per_step": ROWS_PER_STEP}
    options.out.parent.mkdir(exist_ok=True)
    where = environment(("torch", "transformers", "decord2", "av"))
    written = {"environment": where, "settings": settings, "results": found}
    options.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
