"""Positions of Qwen2.5-VL: time is the seconds of a unit, and text goes on where transformers 5.23 says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evs_train.config import ModelSection
from evs_train.data.chat import Prepared
from evs_train.data.video import Clip
from evs_train.data_config import DataSection
from evs_train.models.base import Family
from evs_train.models.loading import load_family


@pytest.fixture(scope="module")
def family(tiny_checkpoint: Callable[[str], Path]) -> Family:
    return load_family(ModelSection(path=str(tiny_checkpoint("qwen2_5_vl"))), DataSection(rows="unused.json"))


def clip(num_frames: int, frames_per_second: float, height: int = 64, width: int = 64) -> Clip:
    """Every tenth frame of a source, from its first second to its last."""
    frames = np.zeros((num_frames, height, width, 3), dtype=np.uint8)
    indices = [10 * i for i in range(num_frames)]
    seconds = num_frames / frames_per_second
    times = np.arange(num_frames) / frames_per_second
    return Clip(frames, indices, 10 * frames_per_second, times, 10 * num_frames, seconds, "clip.mp4")


def prepared(family: Family, *clips: Clip) -> Prepared:
    return family.prepare("a<|vision_start|><|video_pad|><|vision_end|>" * len(clips) + "b", clips, [])


@pytest.mark.parametrize(
    ("fps", "times"),
    [(2.0, [0, 2, 4, 6]), (1.0, [0, 4, 8, 12]), (8.0, [0, 0, 1, 1]), (3.0, [0, 1, 2, 4]), (0.5, [0, 8, 16, 24])],
)
def test_time_positions_are_seconds_times_tokens_per_second(family: Family, fps: float, times: list[int]) -> None:
    one = prepared(family, clip(8, fps))
    positions = family.position_ids(one)
    assert positions is not None
    of_units = positions[0, one.media_mask].view(4, -1)
    assert bool((of_units == of_units[:, :1]).all())
    assert (of_units[:, 0] - of_units[0, 0]).tolist() == times


def test_each_video_has_its_own_seconds(family: Family) -> None:
    both = prepared(family, clip(4, 2.0), clip(4, 1.0))
    torch.testing.assert_close(both.media["second_per_grid_ts"], torch.tensor([1.0, 2.0]))
    positions = family.position_ids(both)
    assert positions is not None
    first, second = positions[0, both.media_mask].view(2, 2, -1)[..., 0].tolist()
    assert (first[1] - first[0], second[1] - second[0]) == (2, 4)


@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
def test_text_goes_on_behind_the_larger_side_whatever_the_time(family: Family, size: tuple[int, int]) -> None:
    """A failure says: transformers goes on elsewhere now; look at docs/serving.md and the adapter's docstring."""
    long = prepared(family, clip(32, 1.0, *size))
    positions = family.position_ids(long)
    assert positions is not None
    places = torch.nonzero(long.media_mask)[:, 0]
    start, after = positions[:, places[0] - 1], positions[:, places[-1] + 1]
    (item,) = long.items
    assert (after - start).tolist() == [1 + max(item.height, item.width)] * 3
    assert int(positions[0, places[-1]]) > int(after[0])  # the video's time reaches beyond the text behind it


@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
def test_engine_positions_go_on_behind_the_width(
    tiny_checkpoint: Callable[[str], Path], family: Family, size: tuple[int, int]
) -> None:
    section = ModelSection(path=str(tiny_checkpoint("qwen2_5_vl")))
    engine = load_family(section, DataSection(rows="unused.json"), "engine")
    two = prepared(engine, clip(8, 2.0, *size), clip(4, 2.0, *size))
    positions, preserved = engine.position_ids(two), family.position_ids(two)
    assert positions is not None
    assert preserved is not None
    places = torch.nonzero(two.media_mask)[:, 0].split([item.num_tokens for item in two.items])
    for item, span in zip(two.items, places, strict=True):
        start, after = positions[:, span[0] - 1], positions[:, span[-1] + 1]
        assert (after - start).tolist() == [1 + item.width] * 3
        inside, unshifted = positions[:, span], preserved[:, span]
        assert torch.equal(inside - inside[:, :1], unshifted - unshifted[:, :1])
    assert torch.equal(positions, preserved) == (size == (64, 96))


def test_engine_positions_count_images_like_videos(tiny_checkpoint: Callable[[str], Path], family: Family) -> None:
    section = ModelSection(path=str(tiny_checkpoint("qwen2_5_vl")))
    engine = load_family(section, DataSection(rows="unused.json"), "engine")
    high = engine.prepare("a<|vision_start|><|image_pad|><|vision_end|>b", [], [Image.new("RGB", (64, 96))])
    positions, places = engine.position_ids(high), torch.nonzero(high.media_mask)[:, 0]
    assert positions is not None
    (item,) = high.items
    assert item.height > item.width
    assert (positions[:, places[-1] + 1] - positions[:, places[0] - 1]).tolist() == [1 + item.width] * 3


def test_only_one_pair_of_markers_surrounds_a_video(family: Family) -> None:
    ids = prepared(family, clip(8, 2.0)).input_ids
    for token in ("<|vision_start|>", "<|vision_end|>"):
        assert int((ids == family.processor.tokenizer.convert_tokens_to_ids(token)).sum()) == 1
