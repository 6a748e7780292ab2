"""Tiny randomly initialised checkpoints on disk, so the real loading code runs without a hub, a GPU or a download.

A tiny checkpoint has the architecture, the special tokens, the processor classes and the file layout of its family, and
about a million parameters. `AutoConfig`, `AutoProcessor` and `AutoModelForImageTextToText.from_pretrained` read it as
they read the real one. A temporal unit becomes 16 to 36 tokens at the usual aspect ratios, whatever the video's size.

Invariant: the files are a pure function of (family, seed, texts, dtype, this file, the transformers version); a
directory holds one complete checkpoint or none (it is built beside its place, then renamed).
Cost: one to three seconds and about 4 MB each; nothing when the checkpoint is already there.
Does not: download anything, know any language beyond its vocabulary, or follow the real models' token ids and sizes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from evs_train.errors import ModelError

STAMP_FILE = "tiny_checkpoint.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Geometry shared by both families: 8 px patches, 2 x 2 merged into one token, 2 frames per temporal unit.
PATCH_SIZE = 8
MERGE_SIZE = 2
TEMPORAL_PATCH_SIZE = 2
TOKEN_PIXELS = (PATCH_SIZE * MERGE_SIZE) ** 2
MIN_TOKENS = 16
MAX_TOKENS = 36

HIDDEN_SIZE = 128
VISION_HIDDEN_SIZE = 64
VOCAB_SIZE = 768  # ceiling of the byte-pair vocabulary, the 256 bytes included
CONTEXT_LENGTH = 32768

# fmt: off
QWEN_SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]
# `<video>` is left out on purpose: it is no token of the real model either, its processor replaces the string.
NEMOTRON_SPECIAL_TOKENS = [
    "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<image>", "<img>", "</img>",
    "<so_start>", "<so_end>", "<so_embedding>",
]

QWEN_TOKENIZER: dict[str, Any] = {
    "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
    "extra_special_tokens": QWEN_SPECIAL_TOKENS, "model_max_length": CONTEXT_LENGTH,
}
NEMOTRON_TOKENIZER: dict[str, Any] = {
    "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<unk>",
    "extra_special_tokens": NEMOTRON_SPECIAL_TOKENS, "model_max_length": CONTEXT_LENGTH,
}
TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN_SIZE, "intermediate_size": 2 * HIDDEN_SIZE, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": CONTEXT_LENGTH,
}
QWEN_TEXT: dict[str, Any] = TEXT | {
    "num_hidden_layers": 3,
    "rope_parameters": {"rope_theta": 500000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
}
QWEN_VISION: dict[str, Any] = {
    "depth": 3, "hidden_size": VISION_HIDDEN_SIZE, "intermediate_size": 2 * VISION_HIDDEN_SIZE, "num_heads": 4,
    "patch_size": PATCH_SIZE, "spatial_merge_size": MERGE_SIZE, "temporal_patch_size": TEMPORAL_PATCH_SIZE,
    "out_hidden_size": HIDDEN_SIZE, "num_position_embeddings": 12 * 12, "deepstack_visual_indexes": [0, 1],
}
QWEN_PIXELS: dict[str, Any] = {
    "patch_size": PATCH_SIZE, "merge_size": MERGE_SIZE, "temporal_patch_size": TEMPORAL_PATCH_SIZE,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}
NEMOTRON_TEXT: dict[str, Any] = TEXT | {
    "layers_block_type": ["linear_attention", "moe", "linear_attention", "full_attention", "mlp"],
    "ssm_state_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 32, "n_groups": 2, "chunk_size": 64,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN_SIZE // 2,
    "moe_shared_expert_intermediate_size": HIDDEN_SIZE,
}
NEMOTRON_VISION: dict[str, Any] = {
    "hidden_size": VISION_HIDDEN_SIZE, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2.0,
    "patch_size": PATCH_SIZE, "max_img_size": 128, "num_cls_tokens": 2, "num_registers": 2,
    "video_temporal_patch_size": TEMPORAL_PATCH_SIZE,
}
NEMOTRON_PIXELS: dict[str, Any] = {"patch_size": PATCH_SIZE, "downsample_ratio": 1 / MERGE_SIZE}
# fmt: on

# `@IMAGE@`, `@VIDEO@` and the Jinja expression `@THINK@` are filled in per family. An assistant turn opens with exactly
# the generation prompt, so a rendered prompt is always a prefix of the rendered conversation.
CHAT_TEMPLATE = """\
{%- set placeholder = {'image': '@IMAGE@', 'video': '@VIDEO@'} -%}
{%- set answer_prefix = @THINK@ -%}
{%- for message in messages -%}
  {{- '<|im_start|>' ~ message.role ~ '\\n' -}}
  {%- if message.role == 'assistant' -%}{{- answer_prefix -}}{%- endif -%}
  {%- if message.content is string -%}{{- message.content -}}
  {%- else -%}
    {%- for part in message.content -%}
      {%- if part.type == 'text' -%}{{- part.text -}}
      {%- elif part.type in placeholder -%}{{- placeholder[part.type] -}}
      {%- else -%}{{- raise_exception('unknown content type: ' ~ part.type) -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' ~ answer_prefix -}}{%- endif -%}
"""

# What the tokenizer knows by heart. Repeated, so that these words stay whole whatever texts are added.
CORPUS = 100 * (
    "system\nYou are a helpful assistant.\nuser\nassistant\nDescribe the image. What happens in this video? Yes. No.",
    "Question: Which direction does the object move? Answer: It moves to the left, right, up, down, top or bottom.",
    "The red, green, blue, yellow, orange, purple, white, black, grey, brown, pink shape is on the screen.",
    "What shape is it? A square, circle, triangle, star, cross, rectangle, ball, diamond, arrow, clockwise, centre.",
    "How many squares, circles, triangles, stars are there? Count them from the first to the second, third, last.",
    "There are zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve. What colour is it?",
    "It turns, appears, disappears, changes, stops, starts, grows, shrinks, enters, leaves and stays nowhere.",
    "Answer with the letter of the correct option only.\nA. before\nB. after\nC. begins\nD. ends\n(A) (B) (C) (D)",
    "When and how long does the person, man, woman or child walk, sit, open the door and look at the camera?",
    "<12.3 seconds> Frame 1 sampled at 0.50 seconds and frame 2 sampled at 1.00 seconds: the scene at this time",
)


def _train_bpe(texts: Iterable[str], special_tokens: list[str]) -> Tokenizer:
    """Train a byte-level BPE on `CORPUS` and `texts`; `special_tokens` take the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, *texts], trainer)
    return tokenizer


def _chat_template(image: str, video: str, think: str) -> str:
    return CHAT_TEMPLATE.replace("@IMAGE@", image).replace("@VIDEO@", video).replace("@THINK@", think)


def _vocabulary(tokenizer: hf.PreTrainedTokenizerBase, bos: str) -> dict[str, Any]:
    """The entries of a text config that follow from the tokenizer. Qwen's has no bos token, its config names one."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.convert_tokens_to_ids(bos),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _qwen3_vl(texts: Iterable[str]) -> tuple[hf.ProcessorMixin, hf.PreTrainedModel]:
    """Qwen3-VL: interleaved m-RoPE, a three-layer vision tower with deepstack from the first two layers."""
    bpe = json.loads(_train_bpe(texts, []).to_str())["model"]
    tokenizer = hf.Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(pair) for pair in bpe["merges"]],
        **QWEN_TOKENIZER,
    )
    pixels = {"shortest_edge": MIN_TOKENS * TOKEN_PIXELS, "longest_edge": MAX_TOKENS * TOKEN_PIXELS}
    processor = hf.Qwen3VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(size=pixels, **QWEN_PIXELS),
        tokenizer=tokenizer,
        # A video's "edges" are pixels of the whole clip. The cap bounds each frame however many there are; from 128
        # frames on the clip's budget takes over and thins a frame to about MIN_TOKENS.
        video_processor=hf.Qwen3VLVideoProcessor(
            size=pixels | {"longest_edge": 128 * pixels["longest_edge"]},
            cap_pixels_per_frame=True,
            max_video_tokens=MAX_TOKENS,
            **QWEN_PIXELS,
        ),
        chat_template=_chat_template(
            "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>", "''"
        ),
    )
    token_id = tokenizer.convert_tokens_to_ids
    config = hf.Qwen3VLConfig(
        text_config=QWEN_TEXT | _vocabulary(tokenizer, bos="<|endoftext|>"),
        vision_config=dict(QWEN_VISION),
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )
    return processor, hf.Qwen3VLForConditionalGeneration(config)


def _nemotron_h_omni(texts: Iterable[str]) -> tuple[hf.ProcessorMixin, hf.PreTrainedModel]:
    """Nemotron Omni without its audio tower: Mamba, mixture of experts, attention and MLP layers; RADIO vision."""
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=_train_bpe(texts, NEMOTRON_SPECIAL_TOKENS),
        **NEMOTRON_TOKENIZER,
    )
    processor = hf.NemotronH_Omni_Reasoning_V3Processor(
        image_processor=hf.NemotronH_Omni_Reasoning_V3ImageProcessor(
            min_num_patches=MIN_TOKENS * MERGE_SIZE**2, max_num_patches=MAX_TOKENS * MERGE_SIZE**2, **NEMOTRON_PIXELS
        ),
        # Every frame is scaled, up or down, to about this many patches: 25 tokens if square, 24 at 16:9.
        video_processor=hf.NemotronH_Omni_Reasoning_V3VideoProcessor(
            video_target_num_patches=100, norm_mean=[0.5, 0.5, 0.5], norm_std=[0.5, 0.5, 0.5], **NEMOTRON_PIXELS
        ),
        tokenizer=tokenizer,
        feature_extractor=hf.ParakeetFeatureExtractor(),  # the processor refuses to be made without one
        video_temporal_patch_dim=TEMPORAL_PATCH_SIZE,
        chat_template=_chat_template("<image>", "<video>", "'<think>\\n' if enable_thinking else '<think></think>'"),
    )
    token_id = tokenizer.convert_tokens_to_ids
    config = hf.NemotronH_Omni_Reasoning_V3_Config(
        text_config=NEMOTRON_TEXT | _vocabulary(tokenizer, bos="<s>"),
        vision_config=dict(NEMOTRON_VISION),
        audio_config=None,
        downsample_ratio=1 / MERGE_SIZE,
        projector_hidden_size=2 * HIDDEN_SIZE,
        vision_hidden_size=VISION_HIDDEN_SIZE,
        video_temporal_patch_size=TEMPORAL_PATCH_SIZE,
        image_token_id=token_id("<image>"),
        video_token_id=None,  # video frames stand under `<image>` too
        audio_token_id=token_id("<so_embedding>"),
    )
    return processor, hf.NemotronH_Omni_Reasoning_V3(config)


Builder = Callable[[Iterable[str]], tuple[hf.ProcessorMixin, hf.PreTrainedModel]]
TINY_FAMILIES: dict[str, Builder] = {"qwen3_vl": _qwen3_vl, "nemotron_h_omni": _nemotron_h_omni}


def _stamp(family: str, seed: int, texts: list[str], dtype: str) -> dict[str, str | int]:
    """Everything the files depend on; equal stamps mean equal checkpoints."""
    return {
        "family": family,
        "seed": seed,
        "dtype": dtype,
        "texts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "builder": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "transformers": hf.__version__,
    }


def _holds(directory: Path, stamp: dict[str, str | int]) -> bool:
    marker = directory / STAMP_FILE
    return marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == stamp


def _write(family: str, directory: Path, seed: int, texts: list[str], dtype: str) -> None:
    """Build the family's processor and model and save both; torch's global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        processor, model = TINY_FAMILIES[family](texts)
    ids = model.config.get_text_config()
    model.generation_config = hf.GenerationConfig(
        bos_token_id=ids.bos_token_id, eos_token_id=ids.eos_token_id, pad_token_id=ids.pad_token_id
    )
    torch.nn.Module.to(model, DTYPES[dtype])
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def build_tiny(family: str, out_dir: Path, *, seed: int = 0, texts: Iterable[str] = (), dtype: str = "float32") -> Path:
    """Put a tiny checkpoint of `family` into `out_dir`, unless the same one is already there.

    Args:
        family: a key of `TINY_FAMILIES` (the `model_type` of the config).
        out_dir: where the checkpoint goes; an older tiny checkpoint there is replaced, any other content is refused.
        seed: seed of the weights.
        texts: more text for the tokenizer to learn, for example the questions and answers of a data set.
        dtype: a key of `DTYPES`: what the weights are stored in.

    Returns:
        `out_dir`.

    Raises:
        ModelError: unknown family or dtype, or `out_dir` holds something that is not a tiny checkpoint.

    """
    for kind, value, known in (("family", family, TINY_FAMILIES), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise ModelError(f"no tiny checkpoint for {kind} {value!r}", f"known: {', '.join(known)}")
    texts = list(texts)
    stamp = _stamp(family, seed, texts, dtype)
    if _holds(out_dir, stamp):
        return out_dir
    if out_dir.exists() and not (out_dir / STAMP_FILE).is_file() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ModelError(f"{out_dir} exists and is not a tiny checkpoint", "name a new or an empty directory")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    # The workshop is a sibling, so that the renames stay within one file system.
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}-") as workshop:
        new = Path(workshop) / "new"
        _write(family, new, seed, texts, dtype)
        (new / STAMP_FILE).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
        try:
            new.rename(out_dir)
        except OSError:  # not empty: an older checkpoint, or another process finished this one first
            if not _holds(out_dir, stamp):
                out_dir.rename(Path(workshop) / "old")
                new.rename(out_dir)
    return out_dir


def main() -> None:
    """`python -m evs_train.models.tiny --family qwen3_vl --out DIR [--seed 0]`."""
    parser = argparse.ArgumentParser(description="Write a tiny randomly initialised checkpoint.")
    parser.add_argument("--family", required=True, choices=sorted(TINY_FAMILIES))
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(build_tiny(arguments.family, arguments.out, seed=arguments.seed))


if __name__ == "__main__":
    main()
