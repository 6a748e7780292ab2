"""InternVL's own: one placeholder for frames and tiles, the processor's ids and pixels, positions, an untied head."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from evs_train.config import ModelSection
from evs_train.data.video import Clip, video_metadata
from evs_train.data_config import DataSection
from evs_train.models.base import Family, frames_tensor
from evs_train.models.loading import load_config, load_family, load_weights
from tests.parity.rig import Rig


@pytest.fixture(scope="module")
def family(tiny_checkpoint: Callable[[str], Path]) -> Family:
    return load_family(ModelSection(path=str(tiny_checkpoint("internvl"))), DataSection(rows="unused.json"))


def clip(num_frames: int, seed: int) -> Clip:
    frames = np.random.default_rng(seed).integers(0, 255, (num_frames, 48, 80, 3), dtype=np.uint8)
    times = np.arange(num_frames) / 2
    return Clip(frames, list(range(num_frames)), 2.0, times, num_frames, num_frames / 2, "clip.mp4")


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_ids_and_pixels_are_its_processor_s(family: Family) -> None:
    """Clips of one length only: the processor stacks them."""
    clips, images = [clip(3, 0), clip(3, 1)], [picture(96, 48), picture(40, 40)]
    text = "a<IMG_CONTEXT>\nb<video>\nc<IMG_CONTEXT>\nd<video>\ne"
    prepared = family.prepare(text, clips, images)
    wanted = family.processor(
        text=[text],
        images=images,
        videos=[frames_tensor(one) for one in clips],
        video_metadata=[video_metadata(one) for one in clips],
        do_sample_frames=False,
        return_tensors="pt",
    )
    assert torch.equal(prepared.input_ids, wanted["input_ids"][0])
    tiles, frames = prepared.media["pixel_values"], prepared.media["pixel_values_videos"]
    assert torch.equal(torch.cat([tiles[0], frames[0], tiles[1], frames[1]]), wanted["pixel_values"])
    assert [(item.kind, item.num_units, item.tokens_per_unit) for item in prepared.items] == [
        ("image", 1, 3 * 16),  # two tiles and a thumbnail
        ("video", 3, 16),
        ("image", 1, 16),
        ("video", 3, 16),
    ]


def test_images_are_tiled_as_the_recipe_says(family: Family, tiny_checkpoint: Callable[[str], Path]) -> None:
    data = DataSection(rows="unused.json", image_kwargs={"crop_to_patches": False})
    whole = load_family(ModelSection(path=str(tiny_checkpoint("internvl"))), data)
    for one, tiles in ((family, 5), (whole, 1)):
        (item,) = one.prepare("<IMG_CONTEXT>", [], [picture(96, 96)]).items
        assert item.num_tokens == 16 * tiles


def test_every_frame_keeps_its_separator(family: Family) -> None:
    prepared = family.prepare("<video>\n", [clip(2, 0)], [])
    decoded = family.processor.tokenizer.decode(prepared.input_ids)
    run = f"<img>{'<IMG_CONTEXT>' * 16}</img>"
    assert decoded == f"Frame1: {run}\nFrame2: {run}\n"


def test_positions_count_all_tokens(family: Family) -> None:
    prepared = family.prepare("a<video>\nb", [clip(4, 0)], [])
    positions = family.position_ids(prepared)
    assert positions is not None
    assert positions.tolist() == [list(range(len(prepared.input_ids)))]


def test_sequential_positions_have_no_gaps(tiny_checkpoint: Callable[[str], Path], mixed_rows: Path) -> None:
    """Kept tokens then stand as if the video had never been longer: other logits than with preserved positions."""
    rig = Rig(tiny_checkpoint("internvl"), mixed_rows)
    seen: dict[str, Any] = {}
    handle = rig.model.register_forward_hook(lambda m, a, kwargs, out: seen.update(kwargs), with_kwargs=True)
    preserved, _ = rig.forward(rig.batch(("two",), 0.75))
    gaps = seen["position_ids"][0].diff()
    sequential, _ = rig.forward(rig.batch(("two",), 0.75, sequential=True))
    handle.remove()
    assert int(gaps.max()) > 1
    assert bool((seen["position_ids"][0].diff() == 1).all())
    assert not torch.allclose(preserved.logits, sequential.logits, atol=1e-3)


def test_frames_and_tiles_are_one_tower_call_each(family: Family, tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = str(tiny_checkpoint("internvl"))
    model: Any = load_weights(ModelSection(path=checkpoint, dtype="float32"), load_config(checkpoint), torch.float32)
    both = [family.prepare("<video><video>", [clip(3, 0), clip(5, 1)], []) for _ in range(2)]
    media = family.merge_media([one.media for one in both])
    calls: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    features = family.encode(model, media, "video")
    assert [len(one[0]) for one in features] == [48, 80, 48, 80]
    assert len(calls) == family.num_encoder_calls(media, "video") == 1
    assert family.num_encoder_calls(media, "image") == 0


def test_a_head_of_its_own_is_not_tied(tiny_checkpoint: Callable[[str], Path]) -> None:
    """The releases' config.json says nothing of tying; transformers 5.23 alone would tie a model without weights."""
    folder = tiny_checkpoint("internvl")
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert "tie_word_embeddings" not in fields
    assert "tie_word_embeddings" not in fields["text_config"]
    config = load_config(str(folder))
    model: Any = AutoModelForImageTextToText.from_config(config)
    assert model.lm_head.weight is not model.model.language_model.embed_tokens.weight
