"""Tiny checkpoints: the real loading classes read them, token counts match features, the files can be trusted."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForImageTextToText, AutoTokenizer, GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.video_utils import VideoMetadata

from evs_train.errors import ModelError
from evs_train.models.nemotron_h_omni import NemotronHOmni
from evs_train.models.tiny import (
    STAMP_FILE,
    TINY_FAMILIES,
    build_tiny,
    glm,
    internvl,
    llava_onevision,
    nemotron,
    qwen,
    video_llama_3,
)
from evs_train.models.tiny.common import MAX_TOKENS, MIN_TOKENS
from tests.plain import plain_config, plain_model, plain_processor

CLASSES = {
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen3VLForConditionalGeneration"),
    "qwen3_vl_moe": ("Qwen3VLProcessor", "Qwen3VLMoeForConditionalGeneration"),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_5": ("Qwen3VLProcessor", "Qwen3_5ForConditionalGeneration"),
    "glm4v": ("Glm4vProcessor", "Glm4vForConditionalGeneration"),
    "glm46v": ("Glm46VProcessor", "Glm46VForConditionalGeneration"),
    "llava_onevision": ("LlavaOnevisionProcessor", "LlavaOnevisionForConditionalGeneration"),
    "video_llama_3": ("VideoLlama3Processor", "VideoLlama3ForConditionalGeneration"),
    "nemotron_h_omni": ("NemotronH_Omni_Reasoning_V3Processor", "NemotronH_Omni_Reasoning_V3"),
    "internvl": ("InternVLProcessor", "InternVLForConditionalGeneration"),
}
QWEN_TOKEN_IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
GLM_TOKEN_IDS = {
    "image_token_id": "<|image|>",
    "video_token_id": "<|video|>",
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}
GLM = ("glm4v", "glm46v")
TOKEN_IDS = dict.fromkeys(CLASSES, QWEN_TOKEN_IDS) | {
    **dict.fromkeys(GLM, GLM_TOKEN_IDS),
    "llava_onevision": {"image_token_id": "<image>", "video_token_id": "<video>"},
    "video_llama_3": {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"},
    "internvl": {"image_token_id": "<IMG_CONTEXT>"},
    "nemotron_h_omni": {"image_token_id": "<image>", "audio_token_id": "<so_embedding>"},
}
SPECIAL_TOKENS = dict.fromkeys(CLASSES, qwen.QWEN_SPECIAL_TOKENS) | {
    **dict.fromkeys(GLM, glm.GLM_SPECIAL_TOKENS),
    "llava_onevision": llava_onevision.SPECIAL_TOKENS,
    "video_llama_3": video_llama_3.SPECIAL_TOKENS,
    "internvl": internvl.INTERNVL_SPECIAL_TOKENS,
    "nemotron_h_omni": nemotron.NEMOTRON_SPECIAL_TOKENS,
}
RENDERED_VIDEO = dict.fromkeys(CLASSES, "<|vision_start|><|video_pad|><|vision_end|>") | {
    **dict.fromkeys(GLM, "<|begin_of_video|><|video|><|end_of_video|>"),
    "llava_onevision": "<video>",
    "video_llama_3": "<|video_pad|>",
    "internvl": "<video>\n",
    "nemotron_h_omni": "<video>",
}
# The token that a video's places hold, where it is not the processor's `video_token`.
VIDEO_PLACES = dict.fromkeys(GLM, "<|image|>") | {"internvl": "<IMG_CONTEXT>", "nemotron_h_omni": "<image>"}
# In the text of a video of eight frames, two per second. The others have no time, or it is in the positions.
TIME_IN_TEXT = {
    "qwen3_vl": "<0.2 seconds>",
    "qwen3_vl_moe": "<0.2 seconds>",
    "qwen3_5": "<0.2 seconds>",
    "glm4v": "<|end_of_image|>3<|end_of_video|>",
    "glm46v": "<|end_of_image|>1.0 seconds<|begin_of_image|>",
    "video_llama_3": "Time 0.0s:<|video_pad|>",
    "internvl": "\nFrame8: <img><IMG_CONTEXT>",
    "nemotron_h_omni": "Frame 3 sampled at 1.00 seconds and frame 4 sampled at 1.50 seconds: <img>",
}
FRAMES_PER_UNIT = dict.fromkeys(CLASSES, 2) | {"llava_onevision": 1, "video_llama_3": 1, "internvl": 1}
BUDGET_FRAMES = dict.fromkeys(CLASSES, 1) | {
    **dict.fromkeys(GLM, glm.CLIP_FRAMES),
    "video_llama_3": video_llama_3.BUDGET_FRAMES,
}
MAX_IMAGE_TOKENS = dict.fromkeys(CLASSES, MAX_TOKENS) | {  # the whole image, four tiles, a newline behind every line
    "llava_onevision": 5 * llava_onevision.PATCHES + 14,
    "internvl": 3 * MAX_TOKENS,  # two tiles and a thumbnail
}
# What the encoder is given beside pixels.
VIDEO_INPUTS = ("video_grid_thw", "video_merge_sizes")
IMAGE_INPUTS = ("image_grid_thw", "image_grid_hw", "image_sizes", "image_merge_sizes")
QUESTION = {"type": "text", "text": "Which direction does the red square move?"}

ROOT = Path(__file__).resolve().parents[2]


class Tiny:
    """One family's checkpoint, read by the classes that read a real one."""

    def __init__(self, family: str, path: Path) -> None:
        self.family = family
        self.is_nemotron = family == "nemotron_h_omni"
        self.path = path
        self.processor: Any = plain_processor(path)
        self.model: Any = plain_model(path).eval()

    def text(self, *content: dict[str, Any], **template_kwargs: Any) -> str:
        messages = [{"role": "user", "content": list(content)}]
        text: str = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **template_kwargs
        )
        return text

    def video_batch(self, num_frames: int, height: int, width: int) -> Any:
        frames = np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)
        metadata = VideoMetadata(
            total_num_frames=10 * num_frames, fps=20.0, frames_indices=[10 * i for i in range(num_frames)]
        )
        return self.processor(
            text=[self.text({"type": "video"}, QUESTION)],
            videos=[frames],
            # Nemotron's processor reads the metadata of the one video it takes; the others want a list.
            video_metadata=metadata if self.is_nemotron else [metadata],
            do_sample_frames=False,
            return_tensors="pt",
        )

    def video_features(self, batch: Any) -> torch.Tensor:
        """Features of the batch's one video, (num_tokens, D)."""
        if self.family == "internvl":  # frames go through the image entry
            frames: torch.Tensor = self.model.get_image_features(batch["pixel_values"], return_dict=True).pooler_output
            return frames.flatten(0, 1)
        extra = {name: batch[name] for name in VIDEO_INPUTS if name in batch}
        out = self.model.get_video_features(batch["pixel_values_videos"], **extra, return_dict=True)
        return out.pooler_output.flatten(0, 1) if self.is_nemotron else out.pooler_output[0]

    def count(self, batch: Any, token: str) -> int:
        return int((batch["input_ids"] == self.processor.tokenizer.convert_tokens_to_ids(token)).sum())


@pytest.fixture(scope="module", params=list(TINY_FAMILIES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(request.param, build_tiny(request.param, tmp_path_factory.mktemp("tiny") / request.param))


def test_auto_classes_and_token_ids(checkpoint: Tiny) -> None:
    processor_class, model_class = CLASSES[checkpoint.family]
    config = plain_config(checkpoint.path)
    assert config.model_type == checkpoint.family
    assert type(checkpoint.processor).__name__ == processor_class
    assert type(checkpoint.model).__name__ == model_class
    assert checkpoint.model.dtype == torch.float32
    assert 0.5e6 < sum(p.numel() for p in checkpoint.model.parameters()) < 1.5e6

    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, config=config)
    assert 600 <= len(tokenizer) <= 1000
    assert len(tokenizer) == config.get_text_config().vocab_size
    for name, token in TOKEN_IDS[checkpoint.family].items():
        assert getattr(config, name) == tokenizer.convert_tokens_to_ids(token), name
    generation = GenerationConfig.from_pretrained(checkpoint.path)
    for ids in (generation, config.get_text_config()):
        assert (ids.eos_token_id, ids.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_layers_cover_the_family(checkpoint: Tiny) -> None:
    config = checkpoint.model.config
    if checkpoint.family.startswith("qwen3_vl"):
        assert len(checkpoint.model.model.visual.deepstack_merger_list) == 2
    elif checkpoint.family == "qwen2_5_vl":
        assert 0 < len(config.vision_config.fullatt_block_indexes) < config.vision_config.depth
    elif checkpoint.family == "qwen3_5":
        assert set(config.text_config.layer_types) == {"linear_attention", "full_attention"}
        assert any(name.startswith("mtp.") for name in load_file(checkpoint.path / "model.safetensors"))
    elif checkpoint.family in GLM:
        assert (config.text_config.model_type, config.vision_config.model_type) == ("glm4v_text", "glm4v_vision")
        assert config.text_config.rope_parameters["partial_rotary_factor"] < 1
    elif checkpoint.family == "llava_onevision":  # see models/tiny/llava_onevision.py
        vision = config.vision_config
        assert vision.image_size % vision.patch_size
        assert vision.image_size // vision.patch_size % 2
    elif checkpoint.family == "video_llama_3":
        processor = checkpoint.processor
        assert processor.video_processor.use_token_compression
        assert (processor.video_processor.merge_size, processor.image_processor.merge_size) == (2, 1)
    elif checkpoint.family == "internvl":
        assert config.text_config.model_type == "qwen2"
        assert config.text_config.rope_parameters["rope_type"] == "dynamic"
        assert not checkpoint.model.all_tied_weights_keys
    else:
        assert set(config.text_config.layers_block_type) == {"linear_attention", "moe", "full_attention", "mlp"}
        assert config.audio_config.num_hidden_layers == len(checkpoint.model.audio_tower.layers) == 1
        assert checkpoint.model.video_pruning_rate == 0


def test_tokenizer_knows_its_words_and_all_bytes(checkpoint: Tiny) -> None:
    tokenizer = checkpoint.processor.tokenizer
    assert set(ByteLevel.alphabet()) <= set(tokenizer.get_vocab())
    text = "The ☃ said: 日本 <12.3 seconds>\n\tFrame 1 sampled at 0.50 seconds "
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(" direction seconds square")["input_ids"]) == 3
    specials = SPECIAL_TOKENS[checkpoint.family]
    assert all(len(tokenizer(token)["input_ids"]) == 1 for token in specials)
    assert ("<video>" in tokenizer.get_vocab()) == ("<video>" in specials)


def test_weights_round_trip_bit_for_bit(checkpoint: Tiny, tmp_path: Path) -> None:
    checkpoint.model.save_pretrained(tmp_path)
    before = load_file(checkpoint.path / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    # Not loaded; see test_export.py.
    before = {name: t for name, t in before.items() if not name.startswith(("mtp.", *NemotronHOmni.not_loaded))}
    after = {name: t for name, t in after.items() if not name.endswith(NemotronHOmni.not_stored)}
    assert before.keys() == after.keys()
    if checkpoint.family == "qwen3_vl_moe":  # see tests/test_upstream.py
        after = {name: t.transpose(1, 2) if ".experts." in name else t for name, t in after.items()}
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("num_frames", "height", "width"), [(8, 64, 64), (9, 96, 96), (4, 270, 480), (4, 480, 270)])
def test_video_tokens_match_features(checkpoint: Tiny, num_frames: int, height: int, width: int) -> None:
    batch = checkpoint.video_batch(num_frames, height, width)
    token = VIDEO_PLACES.get(checkpoint.family, checkpoint.processor.video_token)
    with torch.no_grad():
        features = checkpoint.video_features(batch)
    num_units = math.ceil(num_frames / FRAMES_PER_UNIT[checkpoint.family])
    per_unit = len(features) // num_units  # LLaVA-OneVision's newline is left over
    assert checkpoint.count(batch, token) == len(features)
    assert MIN_TOKENS <= per_unit <= MAX_TOKENS * max(1.0, BUDGET_FRAMES[checkpoint.family] / num_frames)
    # Random frames must not look alike, or selecting tokens by change would be meaningless.
    units = features[: num_units * per_unit].view(num_units, per_unit, -1)
    assert torch.cosine_similarity(units[1:], units[:-1], dim=-1).mean() < 0.9


def test_video_forward(checkpoint: Tiny) -> None:
    batch = checkpoint.video_batch(8, 64, 64)
    with torch.no_grad():
        if checkpoint.is_nemotron:
            outputs = {"video": BaseModelOutputWithPooling(pooler_output=(checkpoint.video_features(batch),))}
            text_inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            logits = checkpoint.model(**text_inputs, mm_encoder_outputs=outputs).logits
        else:
            logits = checkpoint.model(**batch).logits
    if "mm_token_type_ids" in batch:
        token = VIDEO_PLACES.get(checkpoint.family, checkpoint.processor.video_token)
        is_video = batch["input_ids"] == checkpoint.processor.tokenizer.convert_tokens_to_ids(token)
        assert torch.equal(batch["mm_token_type_ids"] == 2, is_video)
    decoded = checkpoint.processor.tokenizer.decode(batch["input_ids"][0])
    times = {time for time in TIME_IN_TEXT.values() if time in decoded}
    assert times == {TIME_IN_TEXT[name] for name in (checkpoint.family,) if name in TIME_IN_TEXT}  # or it is elsewhere
    assert logits.shape == (*batch["input_ids"].shape, len(checkpoint.processor.tokenizer))
    assert logits.isfinite().all()


@pytest.mark.parametrize("size", [(480, 270), (20, 20)])
def test_image_tokens_match_features(checkpoint: Tiny, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "red")
    text = checkpoint.text({"type": "image"}, QUESTION)
    batch = checkpoint.processor(text=[text], images=[image], return_tensors="pt")
    extra = {name: batch[name] for name in IMAGE_INPUTS if name in batch}
    inputs = {name: value for name, value in batch.items() if name != "num_patches"}
    with torch.no_grad():
        out = checkpoint.model.get_image_features(batch["pixel_values"], **extra, return_dict=True)
        features, logits = torch.cat(list(out.pooler_output)), checkpoint.model(**inputs).logits
    assert checkpoint.count(batch, checkpoint.processor.image_token) == len(features)
    assert MIN_TOKENS <= len(features) <= MAX_IMAGE_TOKENS[checkpoint.family]
    assert logits.isfinite().all()


def test_text_starts_uniform_and_can_be_learnt(checkpoint: Tiny) -> None:
    model = plain_model(checkpoint.path)
    texts = ["The red square moves to the left.", "How many stars are there? Three: three, not seven."]
    batch = checkpoint.processor.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model(**batch, labels=labels).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(math.log(len(checkpoint.processor.tokenizer)), abs=0.15)
    assert losses[-1] < 0.3 * losses[0]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("enable_thinking", [False, True])
def test_chat_template_keeps_the_prompt_as_prefix(checkpoint: Tiny, enable_thinking: bool) -> None:
    def render(messages: list[dict[str, Any]], prompt: bool) -> str:
        text: str = checkpoint.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, enable_thinking=enable_thinking
        )
        return text

    user = {"role": "user", "content": [{"type": "video"}, QUESTION]}
    conversation = [
        {"role": "system", "content": "Answer briefly."},
        user,
        {"role": "assistant", "content": "Left."},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": [{"type": "text", "text": "Up."}]},
    ]
    whole = render(conversation, prompt=False)
    for turn in (2, 4):
        prompt = render(conversation[:turn], prompt=True)
        assert whole.startswith(prompt)
        assert whole[len(prompt) :].startswith(("Left.<|im_end|>\n", "Up.<|im_end|>\n"))
    opening = "" if not checkpoint.is_nemotron else "<think>\n" if enable_thinking else "<think></think>"
    video = RENDERED_VIDEO[checkpoint.family]
    assert render([user], prompt=True) == (
        f"<|im_start|>user\n{video}{QUESTION['text']}<|im_end|>\n<|im_start|>assistant\n{opening}"
    )


def test_chat_template_refuses_unknown_content(checkpoint: Tiny) -> None:
    with pytest.raises(Exception, match="unknown content type: audio"):
        checkpoint.text({"type": "audio"})


def test_files_are_a_function_of_the_arguments(checkpoint: Tiny, tmp_path: Path) -> None:
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    again = build_tiny(checkpoint.family, tmp_path / "again")
    assert torch.equal(state, torch.get_rng_state())
    names = sorted(path.name for path in again.iterdir())
    assert names == sorted(path.name for path in checkpoint.path.iterdir())
    for name in names:
        assert (again / name).read_bytes() == (checkpoint.path / name).read_bytes(), name
    other = build_tiny(checkpoint.family, tmp_path / "other", seed=1)
    assert (other / "model.safetensors").read_bytes() != (again / "model.safetensors").read_bytes()
    assert (other / "tokenizer.json").read_bytes() == (again / "tokenizer.json").read_bytes()


def test_same_arguments_leave_the_directory_alone_others_replace_it(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "tiny"
    texts = ["xylophone zyzzyva"] * 20
    assert build_tiny("qwen3_vl", out, texts=texts) == out
    # The parent is in the list because a build makes its workshop there.
    times = [path.stat().st_mtime_ns for path in (out.parent, *sorted(out.iterdir()))]
    build_tiny("qwen3_vl", out, texts=iter(texts))
    assert times == [path.stat().st_mtime_ns for path in (out.parent, *sorted(out.iterdir()))]
    assert len(AutoTokenizer.from_pretrained(out)(" zyzzyva")["input_ids"]) == 1

    build_tiny("qwen3_vl", out)
    assert len(AutoTokenizer.from_pretrained(out)(" zyzzyva")["input_ids"]) > 1
    build_tiny("qwen3_vl", out, dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForImageTextToText.from_pretrained(out).dtype == torch.bfloat16
    assert [path.name for path in out.parent.iterdir()] == ["tiny"]


def test_refusals_name_the_known_and_spare_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"llava.*qwen3_vl, .*nemotron_h_omni"):
        build_tiny("llava", tmp_path / "new")
    with pytest.raises(ModelError, match=r"float16.*float32, bfloat16"):
        build_tiny("qwen3_vl", tmp_path / "new", dtype="float16")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ModelError, match="not a tiny checkpoint"):
        build_tiny("qwen3_vl", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_killed_build_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    command = [sys.executable, "-m", "evs_train.models.tiny", "--family", "qwen3_vl", "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not any(tmp_path.rglob("config.json")):  # the first file of a checkpoint; the weights follow
        assert process.poll() is None, "the build ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists() or (out / STAMP_FILE).is_file()
    build_tiny("qwen3_vl", out)
    assert json.loads((out / STAMP_FILE).read_text())["family"] == "qwen3_vl"
    assert AutoModelForImageTextToText.from_pretrained(out).dtype == torch.float32
