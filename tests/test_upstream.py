"""Faults of transformers that this package works round. A test that fails here says: fixed upstream, drop our part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.video_utils import VideoMetadata

from evs_train.uptrain import Run
from tests.plain import plain_model, plain_processor
from tests.runs import STILL, arguments, metrics, recipe_of


def test_nemotron_omni_has_no_forward_with_video(tiny_checkpoint: Callable[[str], Path]) -> None:
    """`pooler_output` is one tensor and is concatenated as if a sequence: we hand it a tuple (nemotron_h_omni.py)."""
    model = plain_model(tiny_checkpoint("nemotron_h_omni"))
    ids = torch.full((1, 25), model.config.image_token_id)
    with pytest.raises(TypeError, match="cat"):
        model(input_ids=ids, pixel_values_videos=torch.zeros(2, 3, 80, 80))


def test_nemotron_omni_takes_one_video_per_call(tiny_checkpoint: Callable[[str], Path]) -> None:
    """We expand any number with the processor's own pieces (nemotron_h_omni.py)."""
    processor = plain_processor(tiny_checkpoint("nemotron_h_omni"))
    videos = [torch.zeros(2, 3, 80, 80, dtype=torch.uint8)] * 2
    with pytest.raises(AssertionError, match="batch size"):
        processor(text=["<video>", "<video>"], videos=videos, do_sample_frames=False)


def test_qwen3_vl_refuses_one_frame(tiny_checkpoint: Callable[[str], Path]) -> None:
    """We show a single frame for one whole unit (qwen3_vl.py)."""
    processor = AutoProcessor.from_pretrained(tiny_checkpoint("qwen3_vl"))
    frame = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    metadata = VideoMetadata(total_num_frames=1, fps=8.0, frames_indices=[0])
    with pytest.raises(ValueError, match="temporal_factor"):
        processor(text=["<|video_pad|>"], videos=[frame], video_metadata=[metadata], do_sample_frames=False)


@pytest.mark.parametrize("family", ["glm4v", "glm46v"])
def test_glm_has_no_forward_for_images_beside_videos(family: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    """Each kind's features must fill the places of both: we hand over one sequence (glm4v.py)."""
    path = tiny_checkpoint(family)
    model, processor = AutoModelForImageTextToText.from_pretrained(path), AutoProcessor.from_pretrained(path)
    batch = processor(
        text=["<|begin_of_image|><|image|><|end_of_image|><|begin_of_video|><|video|><|end_of_video|>"],
        images=[np.zeros((64, 64, 3), dtype=np.uint8)],
        videos=[np.zeros((4, 64, 64, 3), dtype=np.uint8)],
        video_metadata=[VideoMetadata(total_num_frames=4, fps=2.0, frames_indices=[0, 1, 2, 3])],
        do_sample_frames=False,
        return_tensors="pt",
    )
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(**batch)


@pytest.mark.parametrize("family", ["glm4v", "glm46v"])
def test_glm_refuses_one_frame(family: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    """We show a single frame for one whole unit (qwen_vl.py)."""
    processor = AutoProcessor.from_pretrained(tiny_checkpoint(family))
    frame = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    metadata = VideoMetadata(total_num_frames=1, fps=8.0, frames_indices=[0])
    with pytest.raises(ValueError, match="temporal_factor"):
        processor(text=["<|video|>"], videos=[frame], video_metadata=[metadata], do_sample_frames=False)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl", "qwen3_5", "glm4v", "glm46v"])
def test_classes_say_they_take_no_token_count(
    family: str, tiny_checkpoint: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    """Trainer then tells nobody the count, which our loss is divided by, so we overrule (trainer.py)."""

    def run(name: str, **options: Any) -> Run:
        settings = {**STILL, "evs__rate": 0.5, "train__batch_size": 1, **options}
        return Run(recipe_of(arguments(tiny_checkpoint(family), world, tmp_path / name, **settings)))

    run("rows", train__steps=4).train()
    rows = metrics(tmp_path / "rows")
    tokens = [row["evs/supervised_tokens"] for row in rows]
    trainer = run("step", train__steps=1, train__grad_accumulation=4).build_trainer()
    assert type(trainer.model).accepts_loss_kwargs is False
    trainer.train()
    (step,) = metrics(tmp_path / "step")
    by_token = sum(row["loss"] * count for row, count in zip(rows, tokens, strict=True)) / sum(tokens)
    by_row = sum(row["loss"] for row in rows) / len(rows)
    assert step["loss"] == pytest.approx(by_token, rel=5e-7)
    assert abs(by_token / by_row - 1) > 5e-6  # what Trainer would make of it without a count
    trainer.model_accepts_loss_kwargs = False
    with pytest.raises(AssertionError):  # not a step with the wrong loss
        trainer.train()


def test_qwen3_vl_moe_saves_its_experts_the_other_way_round(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Loading swaps two dimensions, saving does not swap them back: the export does (export.py)."""
    path = tiny_checkpoint("qwen3_vl_moe")
    AutoModelForImageTextToText.from_pretrained(path).save_pretrained(tmp_path)
    before, after = load_file(path / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    name = "model.language_model.layers.0.mlp.experts.down_proj"
    assert before[name].shape != after[name].shape
    assert torch.equal(before[name], after[name].transpose(1, 2))


def test_llava_onevision_s_processor_stacks_videos_of_one_length_only(tiny_checkpoint: Callable[[str], Path]) -> None:
    """We ask it for no tensors, and encode all frames as one long video (llava_onevision.py)."""
    processor = AutoProcessor.from_pretrained(tiny_checkpoint("llava_onevision"))
    videos = [torch.zeros(frames, 3, 60, 60, dtype=torch.uint8) for frames in (2, 1)]
    with pytest.raises(ValueError, match="tensor"):
        processor(text=["<video><video>"], videos=videos, return_tensors="pt")
