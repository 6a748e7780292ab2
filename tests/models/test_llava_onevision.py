"""LLaVA-OneVision: the newline behind a video, 1-D positions, tiled images, and the plain forward of mixed batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evs_train.collate import Collator
from evs_train.config import ModelSection
from evs_train.data.batches import Examples
from evs_train.data.chat import Example, Prepared, build_example
from evs_train.data.manifest import Sample
from evs_train.data.video import Clip
from evs_train.data_config import DataSection
from evs_train.models.base import Family
from evs_train.models.loading import load_family, load_weights
from evs_train.models.tiny.llava_onevision import PATCHES
from evs_train.prune import EvsHook
from evs_train.rates import Rates
from evs_train.samplers import build_sampler

PER_FRAME = 16  # ceil(7 / 2)**2


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("llava_onevision")


@pytest.fixture(scope="module")
def family(checkpoint: Path) -> Family:
    return load_family(ModelSection(path=str(checkpoint)), DataSection(rows="unused.json"))


@pytest.fixture(scope="module")
def model(checkpoint: Path, family: Family) -> Any:
    return load_weights(ModelSection(path=str(checkpoint), dtype="float32"), family.config, torch.float32)


def clip(num_frames: int, seed: int = 0) -> Clip:
    frames = np.random.default_rng(seed).integers(0, 255, (num_frames, 48, 64, 3), dtype=np.uint8)
    return Clip(frames, list(range(num_frames)), 8.0, np.arange(num_frames) / 8, num_frames, num_frames / 8, "clip.mp4")


def image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def prepared(family: Family, text: str, clips: Sequence[Clip], images: Sequence[Image.Image] = ()) -> Prepared:
    return family.prepare(text, clips, images)


def test_the_newline_behind_a_video_is_no_video_token(family: Family, model: Any) -> None:
    one = prepared(family, "a<video><video>b<video>", [clip(4), clip(1, 1), clip(2, 2)])
    is_video = one.input_ids == family.config.video_token_id
    assert [item.num_tokens for item in one.items] == [4 * PER_FRAME, PER_FRAME, 2 * PER_FRAME]
    assert int(is_video.sum()) == 7 * PER_FRAME + 3
    places = torch.nonzero(is_video)[:, 0]
    newlines = places[torch.tensor([4 * PER_FRAME, 5 * PER_FRAME + 1, 7 * PER_FRAME + 2])]
    assert torch.nonzero(is_video & ~one.media_mask)[:, 0].tolist() == newlines.tolist()
    assert int(newlines[-1]) == len(one.input_ids) - 1
    with torch.no_grad():
        features = [one[0] for one in family.encode(model, one.media, "video")]
    assert [len(rows) for rows in features] == [item.num_tokens + 1 for item in one.items]
    assert all(torch.equal(rows[-1], model.model.image_newline) for rows in features)
    for video, rows in zip(one.media["pixel_values_videos"], features, strict=True):
        with torch.no_grad():
            alone = model.get_video_features(video[None], return_dict=True).pooler_output[0]
        torch.testing.assert_close(rows, alone, rtol=1e-4, atol=1e-5)


def test_positions_count_on(family: Family) -> None:
    one = prepared(family, "a<video>b", [clip(2)])
    positions = family.position_ids(one)
    assert positions is not None
    assert positions.tolist() == [list(range(len(one.input_ids)))]


def test_one_image_is_tiled_and_several_are_not(family: Family) -> None:
    single = prepared(family, "<image>", [], [image(120, 60)])
    assert len(single.media["pixel_values"]) == 3  # the whole image and two tiles
    assert single.items[0].num_tokens == PATCHES + 2 * PATCHES + 7  # and a newline behind each of 7 lines
    several = prepared(family, "<image><image>", [], [image(120, 60), image(60, 120)])
    assert len(several.media["pixel_values"]) == 2
    assert [item.num_tokens for item in several.items] == [PATCHES + 1] * 2  # a newline behind each
    assert several.media["batch_num_images"].tolist() == [2]
    assert int(several.media_mask.sum()) == 2 * (PATCHES + 1)


ROWS = [  # images of each row, and their clips' lengths: the plain forward takes videos of one length only
    ([(120, 60)], [2]),
    ([(120, 60), (60, 100)], []),
    ([], [2]),
    ([(60, 60)], []),
]


def test_rows_with_one_and_several_images_in_one_batch(family: Family, model: Any) -> None:
    """As the plain forward does it, on the processor's own batch, with `batch_num_images`."""
    examples, texts, all_images, all_clips = [], [], [], []
    for number, (sizes, lengths) in enumerate(ROWS):
        images = [image(*size, seed=number) for size in sizes]
        clips = [clip(length, seed=number) for length in lengths]
        examples.append(example(family, number, images, clips))
        text = "<image>" * len(images) + "<video>" * len(clips)
        texts.append(f"<|im_start|>user\n{text}What?<|im_end|>\n<|im_start|>assistant\nThat.<|im_end|>\n")
        all_images.append(images)
        all_clips += [torch.from_numpy(one.frames).permute(0, 3, 1, 2) for one in clips]
    family.processor.tokenizer.padding_side = "right"
    inputs = family.processor(text=texts, images=all_images, videos=all_clips, padding=True, return_tensors="pt")
    assert inputs["batch_num_images"].tolist() == [1, 2, 1]
    collator = Collator(
        rates=Rates(build_sampler(0.0)),
        pad_token_id=family.pad_token_id,
        merge_media=family.merge_media,
    )
    batch = collator([Examples(0, examples)])
    assert torch.equal(batch["input_ids"], inputs["input_ids"])
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        plain = model(**inputs)
        ours = model(**EvsHook(family, model).prune(batch))
        del inputs["batch_num_images"]
        with pytest.raises(ValueError, match="tokens"):  # it takes every image for tiled
            model(**inputs)
    assert torch.equal(ours.logits[real], plain.logits[real])


def example(family: Family, number: int, images: list[Image.Image], clips: list[Clip]) -> Example:
    content: list[dict[str, str]] = [{"type": "image"}] * len(images) + [{"type": "video"}] * len(clips)
    messages = (
        {"role": "user", "content": [*content, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "That."}]},
    )
    files = (("clip.mp4",) * len(clips), ("image.png",) * len(images))
    row = Sample(str(number), f"row {number}", messages, *files)
    return build_example(row, clips, images, family, template_kwargs={}, max_length=None)


def test_the_last_norm_is_frozen_because_nothing_reads_it(family: Family, model: Any) -> None:
    """A failure says: the tower's norm is used now; take it out of the adapter's `unused`."""
    one = prepared(family, "<video>", [clip(2)])
    model.zero_grad(set_to_none=True)
    family.encode(model, one.media, "video")[0][0].square().sum().backward()
    silent = [name for name, p in model.named_parameters() if "vision_tower" in name and p.grad is None]
    assert silent == [f"model.vision_tower.post_layernorm.{name}" for name in ("weight", "bias")]
    assert all(name.startswith(family.unused) for name in silent)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_blank_runs_everything_that_trains(family: Family, model: Any, kind: Any) -> None:
    model.zero_grad(set_to_none=True)
    for features in family.encode(model, family.blank(kind), kind):
        features[0][:0].sum().backward(retain_graph=True)
    silent = [
        name
        for name, p in model.named_parameters()
        if not name.startswith(("model.language_model.", "lm_head.", *family.unused)) and p.grad is None
    ]
    assert silent == []
