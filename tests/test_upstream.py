"""Faults of transformers that this package works round. A test that fails here says: fixed upstream, drop our part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration
from transformers.video_utils import VideoMetadata


def test_nemotron_omni_has_no_forward_with_video(tiny_checkpoint: Callable[[str], Path]) -> None:
    """`pooler_output` is one tensor and is concatenated as if a sequence: we hand it a tuple (nemotron_h_omni.py)."""
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint("nemotron_h_omni"))
    ids = torch.full((1, 25), model.config.image_token_id)
    with pytest.raises(TypeError, match="cat"):
        model(input_ids=ids, pixel_values_videos=torch.zeros(2, 3, 80, 80))


def test_nemotron_omni_takes_one_video_per_call(tiny_checkpoint: Callable[[str], Path]) -> None:
    """We expand any number with the processor's own pieces (nemotron_h_omni.py)."""
    processor = AutoProcessor.from_pretrained(tiny_checkpoint("nemotron_h_omni"))
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


def test_qwen3_vl_says_it_takes_no_token_count() -> None:
    """Its forward does pass `num_items_in_batch` on to the loss; the trainer overrides the flag (trainer.py)."""
    assert Qwen3VLForConditionalGeneration.accepts_loss_kwargs is False


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
