"""GLM-4.1V and 4.6V: which tokens are whose, what the text says of time, and which positions the tokens take."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Glm46VProcessor, Glm46VVideoProcessor

from evs_train.config import ModelSection
from evs_train.data.chat import Prepared
from evs_train.data.video import Clip
from evs_train.data_config import DataSection
from evs_train.models.base import Family
from evs_train.models.glm4v import Glm4v
from evs_train.models.loading import load_family, without_weights

VIDEO = "<|begin_of_video|><|video|><|end_of_video|>"
IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"


@pytest.fixture(scope="module", params=["glm4v", "glm46v"])
def family(request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Path]) -> Family:
    return load_family(ModelSection(path=str(tiny_checkpoint(request.param))), DataSection(rows="unused.json"))


def clip(num_frames: int, frames_per_second: float, height: int = 64, width: int = 64) -> Clip:
    """Every tenth frame of a source, from its first second to its last."""
    frames = np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)
    indices = [10 * i for i in range(num_frames)]
    times = np.arange(num_frames) / frames_per_second
    return Clip(
        frames, indices, 10 * frames_per_second, times, 10 * num_frames, num_frames / frames_per_second, "clip.mp4"
    )


def text_of(family: Family, prepared: Prepared) -> str:
    """The expanded text, each run of media tokens shown once."""
    decoded: str = family.processor.tokenizer.decode(prepared.input_ids)
    return re.sub(r"(<\|image\|>)+", "<|image|>", decoded)


def times_of(family: Family, prepared: Prepared) -> list[str]:
    """What stands behind each unit of a video."""
    return re.findall(
        r"<\|end_of_image\|>([^<]*)(?=<\|begin_of_image\|>|<\|end_of_video\|>)", text_of(family, prepared)
    )


@pytest.mark.parametrize(
    ("num_frames", "fps", "seconds"),
    [
        (8, 2.0, [0, 1, 2, 3]),
        (7, 2.0, [0, 1, 2, 3]),  # an odd clip: the last frame counts twice
        (1, 2.0, [0]),  # a still
        (3, 2.0, [0, 1]),
        (6, 1.0, [0, 2, 4]),
        (6, 8.0, [0, 0.25, 0.5]),  # too close for whole seconds
        (4, 0.4, [0, 5]),
    ],
)
def test_each_unit_is_followed_by_the_time_of_its_first_frame(
    family: Family, num_frames: int, fps: float, seconds: list[float]
) -> None:
    prepared = family.prepare(VIDEO, [clip(num_frames, fps)], [])
    (item,) = prepared.items
    assert item.num_units == len(seconds)  # all frames were used: none was sampled again
    short = family.model_type == "glm4v"
    assert times_of(family, prepared) == [str(int(s)) if short else f"{s:.1f} seconds" for s in seconds]


def test_a_wrong_rate_writes_wrong_times_and_nothing_else(family: Family) -> None:
    """Why `video_metadata` takes such care of fps: tokens and positions do not show the fault."""
    right = family.prepare(VIDEO, [clip(8, 2.0)], [])
    wrong = family.prepare(VIDEO, [clip(8, 1.0)], [])
    assert times_of(family, right) != times_of(family, wrong)
    assert right.items == wrong.items
    assert torch.equal(right.media["pixel_values_videos"], wrong.media["pixel_values_videos"])
    assert torch.equal(right.media["video_grid_thw"], wrong.media["video_grid_thw"])


def test_token_types_are_the_processor_s(family: Family) -> None:
    """They come from the reading order here, from the marks round a video there; both kinds have the same ids."""
    photo = Image.new("RGB", (48, 48), "red")
    prepared = family.prepare(f"a{IMAGE}b{VIDEO}c{IMAGE}d", [clip(8, 2.0)], [photo, photo])
    assert [item.kind for item in prepared.items] == ["image", "video", "image"]
    assert len(prepared.input_ids[prepared.media_mask].unique()) == 1
    expected = torch.tensor(family.processor.create_mm_token_type_ids([prepared.input_ids.tolist()]))[0]
    counts = [item.num_tokens for item in prepared.items]
    assert expected[prepared.media_mask].tolist() == counts[0] * [1] + counts[1] * [2] + counts[2] * [1]
    model: Any = without_weights(family.config)
    grids = {name: prepared.media[name] for name in ("image_grid_thw", "video_grid_thw")}
    positions, _ = model.model.get_rope_index(prepared.input_ids[None], mm_token_type_ids=expected[None], **grids)
    found = family.position_ids(prepared)
    assert found is not None
    assert torch.equal(found, positions[:, 0])


@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
def test_each_unit_is_a_grid_of_its_own_behind_the_text_before_it(family: Family, size: tuple[int, int]) -> None:
    photo = Image.new("RGB", (80, 48), "red")
    prepared = family.prepare(f"a{VIDEO}b{IMAGE}c", [clip(4, 2.0, *size)], [photo])
    positions = family.position_ids(prepared)
    assert positions is not None
    grids = [(item.height, item.width) for item in prepared.items for _ in range(item.num_units)]
    assert len(grids) == 3
    place = position = 0
    while place < len(prepared.input_ids):
        if not prepared.media_mask[place]:
            assert positions[:, place].tolist() == [position] * 3
            place, position = place + 1, position + 1
            continue
        height, width = grids.pop(0)
        for row in range(height):
            for column in range(width):
                assert positions[:, place].tolist() == [position, position + row, position + column]
                place += 1
        position += max(height, width)
    assert grids == []


def test_the_released_4_6v_flash_has_4_1v_s_architecture_and_4_6v_s_processor(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    family = load_family(ModelSection(path=str(tiny_checkpoint("glm4v"))), DataSection(rows="unused.json"))
    old = family.processor
    video = Glm46VVideoProcessor(size=dict(old.video_processor.size), patch_size=8, merge_size=2, temporal_patch_size=2)
    new = Glm46VProcessor(old.image_processor, old.tokenizer, video, chat_template=old.chat_template)
    flash = Glm4v(family.config, new)
    prepared = flash.prepare(VIDEO, [clip(6, 2.0)], [])
    assert times_of(flash, prepared) == ["0.0 seconds", "1.0 seconds", "2.0 seconds"]
    assert flash.position_ids(prepared) is not None
