"""What the tiny checkpoints share: sizes, a small corpus with its byte-level tokenizer, and the chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

# Geometry shared by all families: 8 px patches, 2 x 2 merged into one token, 2 frames per temporal unit.
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
TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN_SIZE, "intermediate_size": 2 * HIDDEN_SIZE, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": CONTEXT_LENGTH,
}
# Qwen2 and 2.5 know no `head_dim`. Positions count 0, 1, 2, ...
QWEN2_TEXT: dict[str, Any] = {name: value for name, value in TEXT.items() if name != "head_dim"} | {
    "model_type": "qwen2", "num_hidden_layers": 3,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
}
QWEN2_TOKENIZER: dict[str, Any] = {
    "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "model_max_length": CONTEXT_LENGTH,
}
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


def train_bpe(texts: Iterable[str], special_tokens: list[str]) -> Tokenizer:
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


def qwen2_tokenizer(
    texts: Iterable[str], special_tokens: list[str], kind: type = hf.Qwen2Tokenizer
) -> hf.PreTrainedTokenizerBase:
    """Tokenizer of the class that Qwen's text models have; `special_tokens` include its end and padding tokens."""
    bpe = json.loads(train_bpe(texts, []).to_str())["model"]
    tokenizer: hf.PreTrainedTokenizerBase = kind(
        vocab=bpe["vocab"],
        merges=[tuple(pair) for pair in bpe["merges"]],
        extra_special_tokens=special_tokens,
        **QWEN2_TOKENIZER,
    )
    return tokenizer


def chat_template(image: str, video: str, think: str) -> str:
    """The template with a family's placeholders, and the Jinja expression that opens an assistant's turn."""
    return CHAT_TEMPLATE.replace("@IMAGE@", image).replace("@VIDEO@", video).replace("@THINK@", think)


def vocabulary(tokenizer: hf.PreTrainedTokenizerBase, bos: str) -> dict[str, Any]:
    """The entries of a text config that follow from the tokenizer. Qwen's has no bos token, its config names one."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.convert_tokens_to_ids(bos),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
