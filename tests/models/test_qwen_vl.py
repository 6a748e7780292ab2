"""A clip of one frame, which the Qwen adapters repeat to fill a temporal unit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from evs_train.config import ModelSection
from evs_train.data.video import Clip
from evs_train.data_config import DataSection
from evs_train.models.loading import load_family


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_moe", "qwen3_5"])
def test_a_still_has_the_time_of_its_frame(name: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    family = load_family(ModelSection(path=str(tiny_checkpoint(name))), DataSection(rows="unused.json"))
    frames = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    still = Clip(frames, [45], 30.0, np.array([1.5]), 90, 3.0, "still.mp4")
    prepared = family.prepare("<|vision_start|><|video_pad|><|vision_end|>", [still], [])
    assert "<1.5 seconds>" in family.processor.tokenizer.decode(prepared.input_ids)
    assert [item.num_units for item in prepared.items] == [1]
