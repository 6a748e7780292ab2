"""VideoLLaMA 3: its own pruning is off, time stands before each frame, and positions count on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evs_train.config import ModelSection
from evs_train.data.video import Clip, video_metadata
from evs_train.data_config import DataSection
from evs_train.models.base import Family, frames_tensor
from evs_train.models.loading import load_family, load_weights

TEXT = "a<|video_pad|>b"


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("video_llama_3")


def load(checkpoint: Path, **video_kwargs: Any) -> Family:
    return load_family(
        ModelSection(path=str(checkpoint)), DataSection(rows="unused.json", video_kwargs=dict(video_kwargs))
    )


def clip(num_frames: int, frames_per_second: float = 8.0) -> Clip:
    """A picture that stands still."""
    picture = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    times = np.arange(num_frames) / frames_per_second
    frames = np.repeat(picture[None], num_frames, axis=0)
    seconds = num_frames / frames_per_second
    return Clip(frames, list(range(num_frames)), frames_per_second, times, num_frames, seconds, "clip.mp4")


@pytest.mark.parametrize("video_kwargs", [{}, {"use_token_compression": True}])
def test_no_token_is_compressed_away_while_training(checkpoint: Path, video_kwargs: dict[str, Any]) -> None:
    family, video = load(checkpoint, **video_kwargs), clip(6)
    one = family.prepare(TEXT, [video], [])
    (item,) = one.items
    assert (item.num_units, item.height, item.width) == (6, 4, 6)
    assert int(one.media_mask.sum()) == item.num_tokens
    released = family.processor(
        text=[TEXT],
        videos=[frames_tensor(video)],
        video_metadata=[video_metadata(video)],
        do_sample_frames=False,
        return_tensors="pt",
    )
    left = int((released["input_ids"] == family.config.video_token_id).sum())
    assert left == item.tokens_per_unit + 5  # the first frame, and one token of each that follows


def test_time_stands_before_each_frame(checkpoint: Path) -> None:
    family = load(checkpoint)
    one = family.prepare(TEXT, [clip(4, 2.0)], [])
    (item,) = one.items
    frame = "<|video_pad|>" * item.tokens_per_unit
    wanted = "a" + ",".join(f"Time {seconds}s:{frame}" for seconds in ("0.0", "0.5", "1.0", "1.5")) + "b"
    assert family.processor.tokenizer.decode(one.input_ids) == wanted


def test_positions_count_on(checkpoint: Path) -> None:
    family = load(checkpoint)
    one = family.prepare(TEXT, [clip(2)], [])
    positions = family.position_ids(one)
    assert positions is not None
    assert positions.tolist() == [list(range(len(one.input_ids)))]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_blank_is_one_token(checkpoint: Path, kind: Any) -> None:
    family = load(checkpoint)
    model = load_weights(ModelSection(path=str(checkpoint), dtype="float32"), family.config, torch.float32)
    (features,) = family.encode(model, family.blank(kind), kind)
    assert features[0].shape == (1, family.config.text_config.hidden_size)
