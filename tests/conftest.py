"""Shared fixtures: tiny checkpoints of every family and a small rendered world, built once per test run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

from evs_train.data.synthetic import write_dataset
from evs_train.models import FAMILIES
from evs_train.models.tiny import build_tiny
from tests.runs import Ranks

pytest_plugins = ["tests.families"]
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of a parallel run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def tiny_checkpoint(shared_tmp: Path) -> Callable[[str], Path]:
    """Path of the tiny checkpoint of a family."""

    def path_of(family: str) -> Path:
        with FileLock(str(shared_tmp / f"{family}.lock")):
            return build_tiny(family, shared_tmp / "checkpoints" / family)

    return path_of


@pytest.fixture(scope="session")
def world(shared_tmp: Path) -> Path:
    """Rows (`train.jsonl`) of a small rendered world: video, image and text rows."""
    with FileLock(str(shared_tmp / "world.lock")):
        return write_dataset(shared_tmp / "world", num_clips=16, seed=0, size=64, num_frames=12)


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two processes that train what they are asked to, started when first used."""
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def mixed_rows(world: Path, shared_tmp: Path) -> Path:
    """Rows of every shape a batch can hold: two videos, an image, text, one frame, image before video, two turns."""
    with FileLock(str(shared_tmp / "mixed.lock")):
        path = shared_tmp / "mixed" / "rows.json"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            clips = world.parent / "clips"
            write_noise(path.parent / "still.mp4", num_frames=1)
            write_noise(path.parent / "wide.mp4", num_frames=18, width=96)
            pixels = np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path.parent / "photo.png")
            a, b = str(clips / "000000.mp4"), str(clips / "000001.mp4")
            wide = str(path.parent / "wide.mp4")
            path.write_text(json.dumps(_mixed(a, b, wide)), encoding="utf-8")
    return path


def _mixed(a: str, b: str, wide: str) -> list[dict[str, object]]:
    def row(name: str, *turns: str, **media: object) -> dict[str, object]:
        roles = ("human", "gpt")
        talk = [{"from": roles[i % 2], "value": text} for i, text in enumerate(turns)]
        return {"id": name, "conversations": talk, **media}

    return [
        row("two", "<video>\nand\n<video>\nWhat moves?", "A red circle.", "Where?", "Left.", video=[a, wide]),
        row("image", "<image>\nDescribe the picture.", "Noise.", image="photo.png"),
        row("text", "What is one plus one?", "Two."),
        row("still", "<video>\nDescribe the clip.", "A square.", video="still.mp4"),
        row("both", "<image>\n<video>\nCompare them.", "They differ.", video=b, image="photo.png"),
    ]


def write_noise(path: Path, num_frames: int, width: int = 64) -> None:
    """A clip of 8 frames a second in which every frame differs from the one before in its lower half only."""
    import av

    rng = np.random.default_rng(1)
    picture = rng.integers(0, 255, (64, width, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = width, 64, "yuv420p"
        for _ in range(num_frames):
            picture[32:] = rng.integers(0, 255, (32, width, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(params=sorted(FAMILIES))
def family_name(request: pytest.FixtureRequest) -> str:
    """Every supported family in turn."""
    return str(request.param)
