"""Conversations to `input_ids` and `labels`, with the place of every media token.

A chat template renders the conversation, the model family's adapter expands each placeholder into its media tokens, and
the assistant's turns are found again in the expanded ids. A turn is located by its own token sequence, header included,
and by how often the same text stands before it, so nothing is assumed about how a processor expands placeholders, and a
template that cannot be followed is an error instead of a wrong label.

Invariant: supervised tokens are never media tokens, and there is at least one in every example.
Cost: three renderings and one tokenization per assistant turn, beside the processor's own work.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from jinja2 import TemplateError
from PIL.Image import Image
from torch import Tensor

from evs_train.data.manifest import Sample
from evs_train.data.video import Clip
from evs_train.errors import DataError

Kind = Literal["video", "image"]
Media = dict[str, Any]
"""Inputs of the vision encoder by name: tensors, or lists of tensors where sizes differ."""

IGNORE_INDEX = -100
THUMBNAIL_SIDE = 320


@dataclass(frozen=True)
class MediaItem:
    """One video or image as the language model sees it: `num_units` grids of `height` x `width` tokens."""

    kind: Kind
    num_units: int
    height: int
    width: int

    @property
    def tokens_per_unit(self) -> int:
        return self.height * self.width

    @property
    def num_tokens(self) -> int:
        return self.num_units * self.tokens_per_unit


@dataclass(frozen=True)
class Prepared:
    """What a family's adapter makes of one rendered conversation.

    Attributes:
        input_ids: (L,) int64, placeholders expanded.
        media: encoder inputs of all media of the sample.
        items: media in reading order.
        media_mask: (L,) bool, true at the tokens that stand for media.
    """

    input_ids: Tensor
    media: Media
    items: tuple[MediaItem, ...]
    media_mask: Tensor


class SampleEncoder(Protocol):
    """What this module needs of a family's adapter (see `models/base.py`)."""

    processor: Any

    def prepare(self, text: str, clips: Sequence[Clip], images: Sequence[Image]) -> Prepared: ...

    def position_ids(self, prepared: Prepared) -> Tensor | None: ...


@dataclass(frozen=True)
class Example:
    """One training example, unpruned.

    Attributes:
        draw: place in the global order of the run (see `batches.py`).
        sample_id: id of the row.
        input_ids, labels: (L,) int64; labels are `IGNORE_INDEX` outside the assistant's turns.
        position_ids: (P, L) int64, or None for families that take none.
        media: encoder inputs.
        items: media in reading order.
        spans: for each item, (num_tokens,) int64 indices of its tokens in `input_ids`, in raster order.
        frames: for each video, one reduced frame per unit (T, H', W', 3) uint8 if pictures are wanted, else empty.
    """

    draw: int
    sample_id: str
    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None
    media: Media
    items: tuple[MediaItem, ...]
    spans: tuple[Tensor, ...]
    frames: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class Turn:
    """An assistant's turn in the rendered text.

    Attributes:
        header: what prompts it, such as "<|im_start|>assistant" and a newline.
        answer: what is trained on, the end-of-turn token included.
        earlier: how often header + answer stands before the turn: in a like turn, or written out in a user's text.
    """

    header: str
    answer: str
    earlier: int


def build_example(
    sample: Sample,
    clips: Sequence[Clip],
    images: Sequence[Image],
    encoder: SampleEncoder,
    *,
    draw: int,
    template_kwargs: Mapping[str, Any],
    max_length: int | None,
    keep_frames: bool = False,
) -> Example:
    """Render, expand, tokenize and label one sample whose media are decoded.

    Raises:
        DataError: the template cannot be followed, a placeholder is lost, or the sample is longer than `max_length`
            tokens (it is refused, never cut: a cut inside a video breaks the match of tokens and features).
    """
    messages = list(sample.messages)
    prepared = _prepare(sample, clips, images, encoder, template_kwargs)
    ids = prepared.input_ids
    if max_length is not None and len(ids) > max_length:
        raise DataError(
            f"{sample.source}: {len(ids)} tokens before pruning, above data.max_length = {max_length}",
            "sample fewer frames (data.fps, data.num_frames, data.max_frames) or raise data.max_length",
        )
    turns = assistant_turns(encoder.processor, messages, template_kwargs, sample.source)
    labels = label_turns(ids, turns, encoder.processor.tokenizer, sample.source)
    if bool((labels[prepared.media_mask] != IGNORE_INDEX).any()):
        raise DataError(f"{sample.source}: an answer contains media", "media belong in the user's turns")
    example = _example(sample, prepared, encoder, labels, draw)
    return dataclasses.replace(example, frames=_thumbnails(clips, prepared.items)) if keep_frames else example


def build_prompt(
    sample: Sample,
    clips: Sequence[Clip],
    images: Sequence[Image],
    encoder: SampleEncoder,
    *,
    template_kwargs: Mapping[str, Any],
) -> Example:
    """A conversation up to where the assistant's answer begins, without labels. Raises DataError as `build_example`."""
    prepared = _prepare(sample, clips, images, encoder, template_kwargs, add_generation_prompt=True)
    return _example(sample, prepared, encoder, torch.full_like(prepared.input_ids, IGNORE_INDEX), draw=0)


def _prepare(
    sample: Sample,
    clips: Sequence[Clip],
    images: Sequence[Image],
    encoder: SampleEncoder,
    template_kwargs: Mapping[str, Any],
    *,
    add_generation_prompt: bool = False,
) -> Prepared:
    processor = encoder.processor
    text = _render(processor, sample.messages, template_kwargs, sample.source, add_generation_prompt)
    for token, count in ((processor.video_token, len(clips)), (processor.image_token, len(images))):
        if text.count(token) != count:
            raise DataError(
                f"{sample.source}: the rendered conversation has {text.count(token)} {token} for {count} file(s)",
                f"remove or reword a literal {token} in the row's text",
            )
    return encoder.prepare(text, clips, images)


def _example(sample: Sample, prepared: Prepared, encoder: SampleEncoder, labels: Tensor, draw: int) -> Example:
    return Example(
        draw=draw,
        sample_id=sample.id,
        input_ids=prepared.input_ids,
        labels=labels,
        position_ids=encoder.position_ids(prepared),
        media=prepared.media,
        items=prepared.items,
        spans=_spans(prepared, sample.source),
    )


def assistant_turns(
    processor: Any, messages: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any], source: str
) -> list[Turn]:
    """Header and answer of every assistant's turn, read off the template by rendering up to and past the turn."""
    turns = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise DataError(f"{source}: the conversation starts with the assistant", "a user's turn must come first")
        before = _render(processor, messages[:index], template_kwargs, source)
        prompt = _render(processor, messages[:index], template_kwargs, source, add_generation_prompt=True)
        after = _render(processor, messages[: index + 1], template_kwargs, source)
        if not (prompt.startswith(before) and after.startswith(prompt)):
            raise DataError(
                f"{source}: the chat template renders turn {index + 1} unlike the prompt that generation would see",
                "set data.template_kwargs (such as enable_thinking: false) so that prompt + answer is the rendering",
            )
        header, answer = prompt[len(before) :], after[len(prompt) :].rstrip()
        turns.append(Turn(header, answer, earlier=before.count(header + answer)))
    return turns


def label_turns(input_ids: Tensor, turns: Sequence[Turn], tokenizer: Any, source: str) -> Tensor:
    """Labels that train on the answers of `turns` and on nothing else.

    Args:
        input_ids: (L,) int64 with placeholders expanded.

    Returns:
        (L,) int64, a copy of `input_ids` in the answers (end-of-turn token included), `IGNORE_INDEX` elsewhere.

    Raises:
        DataError: a turn's tokens are not found in `input_ids`, or nothing would be supervised.
    """
    ids = input_ids.numpy()
    labels = np.full_like(ids, IGNORE_INDEX)
    for number, turn in enumerate(turns, start=1):
        encoded = tokenizer(turn.header + turn.answer, add_special_tokens=False, return_offsets_mapping=True)
        block = np.asarray(encoded["input_ids"], dtype=ids.dtype)
        # A token that begins in the header but ends in the answer is part of what generation must produce.
        supervised = np.asarray([end > len(turn.header) for _, end in encoded["offset_mapping"]])
        start = _find(ids, block, turn.earlier)
        if start is None:
            raise DataError(
                f"{source}: the tokens of assistant turn {number} are not found in the rendered conversation",
                "the chat template changes earlier turns; see data.template_kwargs",
            )
        labels[start : start + len(block)][supervised] = block[supervised]
    if not (labels != IGNORE_INDEX).any():
        raise DataError(f"{source}: no token would be trained on", "the answers are empty")
    return torch.from_numpy(labels)


def _find(ids: np.ndarray, block: np.ndarray, earlier: int) -> int | None:
    """Where `block` stands in `ids` after `earlier` other, not overlapping places."""
    end = 0
    for begin in np.flatnonzero(ids[: len(ids) - len(block) + 1] == block[0]).tolist():
        if begin >= end and np.array_equal(ids[begin : begin + len(block)], block):
            if earlier == 0:
                return int(begin)
            earlier, end = earlier - 1, begin + len(block)
    return None


def _render(
    processor: Any,
    messages: Sequence[Mapping[str, Any]],
    template_kwargs: Mapping[str, Any],
    source: str,
    add_generation_prompt: bool = False,
) -> str:
    try:
        text: str = processor.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **template_kwargs
        )
    except TemplateError as error:
        raise DataError(f"{source}: the chat template refuses the conversation: {error}") from error
    return text


def _thumbnails(clips: Sequence[Clip], items: Sequence[MediaItem]) -> tuple[np.ndarray, ...]:
    """First frame of each unit of each video, reduced: (T, H', W', 3) uint8, sides up to THUMBNAIL_SIDE."""
    thumbnails = []
    for clip, item in zip(clips, (item for item in items if item.kind == "video"), strict=True):
        frames_per_unit = math.ceil(len(clip.frames) / item.num_units)
        stride = math.ceil(max(clip.frames.shape[1:3]) / THUMBNAIL_SIDE)
        thumbnails.append(clip.frames[::frames_per_unit, ::stride, ::stride].copy())
    return tuple(thumbnails)


def _spans(prepared: Prepared, source: str) -> tuple[Tensor, ...]:
    places = torch.nonzero(prepared.media_mask)[:, 0]
    counts = [item.num_tokens for item in prepared.items]
    if len(places) != sum(counts):
        raise DataError(
            f"{source}: the rendered conversation has {len(places)} media tokens but its media make {sum(counts)}",
            "does the chat template write media tokens by itself?",
        )
    return tuple(torch.split(places, counts))
