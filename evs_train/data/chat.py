"""Conversations to `input_ids` and `labels`, with the place of every media token.

A chat template renders the conversation, the model family's adapter expands each placeholder into its media tokens, and
the assistant's turns are found again in the expanded ids (`template.py`).

Invariant: supervised tokens are never media tokens, and there is at least one in every example.
Cost: that of `template.py`, beside the processor's own work.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from evs_train.data.manifest import Sample
from evs_train.data.quarantine import BadSample
from evs_train.data.template import IGNORE_INDEX, Renderer, as_the_template_reads, assistant_turns, label_turns, render
from evs_train.data.video import Clip
from evs_train.errors import DataError

Kind = Literal["video", "image"]
Media = dict[str, Any]
"""Inputs of the vision encoder by name: tensors, or lists of tensors where sizes differ."""
PIXELS: dict[Kind, str] = {"image": "pixel_values", "video": "pixel_values_videos"}
"""Those of them that hold what media show; the others say what shape it has."""
Picture = Image | Tensor
"""A decoded image; of one that is a shape only, (3, H, W) uint8 on the meta device."""

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


class SampleEncoder(Renderer, Protocol):
    """What `data` needs of a family's adapter (see `models/base.py`)."""

    reads_pixels: ClassVar[bool]

    def prepare(self, text: str, clips: Sequence[Clip], images: Sequence[Picture]) -> Prepared: ...

    def position_ids(self, prepared: Prepared) -> Tensor | None: ...

    def changes(self, prepared: Prepared) -> tuple[Tensor, ...]: ...

    def split_media(self, media: Media, kind: Kind) -> list[Media]: ...

    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Example:
    """One training example, unpruned.

    Attributes:
        sample_id: id of the row.
        input_ids, labels: (L,) int64; labels are `IGNORE_INDEX` outside the assistant's turns.
        position_ids: (P, L) int64, or None for families that take none.
        media: encoder inputs.
        items: media in reading order.
        spans: for each item, (num_tokens,) int64 indices of its tokens in `input_ids`, in raster order.
        frames: for each video, one reduced frame per unit (T, H', W', 3) uint8 if pictures are wanted, else empty.
        draw: place in the global order of the run (see `order.py`).
        share: of the sampled frames that are here; less than 1 where a token budget demanded it (`schedule.py`).
        bad: the samples that this draw met before, and could not read (see `quarantine.py`).
        decoded_by: what decoded each video (see `Clip.backend`).
        changes: for each video, (T, N) float32 how the pixels of its tokens change, if that is measured, else empty.
    """

    sample_id: str
    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None
    media: Media
    items: tuple[MediaItem, ...]
    spans: tuple[Tensor, ...]
    frames: tuple[np.ndarray, ...] = ()
    draw: int = 0
    share: float = 1.0
    bad: tuple[BadSample, ...] = ()
    decoded_by: tuple[str, ...] = ()
    changes: tuple[Tensor, ...] = ()


def build_example(
    sample: Sample,
    clips: Sequence[Clip],
    images: Sequence[Picture],
    encoder: SampleEncoder,
    *,
    template_kwargs: Mapping[str, Any],
    max_length: int | None,
    keep_frames: bool = False,
    last_only: bool = False,
    measure_changes: bool = False,
) -> Example:
    """Render, expand, tokenize and label one sample whose media are decoded.

    Args:
        measure_changes: of the videos' pixels, for pruners that look at them.
        last_only: train on the last answer alone. Templates of thinking models render earlier ones otherwise than
            generation saw them.

    Raises:
        DataError: the template cannot be followed, a placeholder is lost, or the sample is longer than `max_length`
            tokens (it is refused, never cut: a cut inside a video breaks the match of tokens and features).
    """
    messages = as_the_template_reads(sample, encoder, template_kwargs, last_only)
    turns = assistant_turns(encoder, messages, template_kwargs, sample.source, last_only=last_only)
    text = render(encoder, messages, template_kwargs, sample.source)
    if messages[-1]["role"] == "assistant" and not text.rstrip().endswith(turns[-1].answer):
        text = text.rstrip() + encoder.end_of_turn
    prepared = _prepare(sample, text, clips, images, encoder)
    ids = prepared.input_ids
    if max_length is not None and len(ids) > max_length:
        raise DataError(
            f"{sample.source}: {len(ids)} tokens before pruning, above data.max_length = {max_length}",
            "sample fewer frames (data.fps, data.num_frames, data.max_frames) or raise data.max_length",
            "too long",
        )
    labels = label_turns(ids, turns, encoder.processor.tokenizer, sample.source)
    if bool((labels[prepared.media_mask] != IGNORE_INDEX).any()):
        raise DataError(f"{sample.source}: an answer contains media", "media belong in the user's turns")
    example = _example(sample, prepared, encoder, labels, measure_changes)
    frames = _thumbnails(clips, prepared.items) if keep_frames else ()
    return dataclasses.replace(example, frames=frames, decoded_by=tuple(clip.backend for clip in clips))


def build_prompt(
    sample: Sample,
    clips: Sequence[Clip],
    images: Sequence[Picture],
    encoder: SampleEncoder,
    *,
    template_kwargs: Mapping[str, Any],
    measure_changes: bool = False,
) -> Example:
    """A conversation up to where the assistant's answer begins, without labels. Raises DataError as `build_example`."""
    messages = as_the_template_reads(sample, encoder, template_kwargs, last_only=True)
    text = render(encoder, messages, template_kwargs, sample.source, add_generation_prompt=True)
    prepared = _prepare(sample, text, clips, images, encoder)
    return _example(sample, prepared, encoder, torch.full_like(prepared.input_ids, IGNORE_INDEX), measure_changes)


def _prepare(
    sample: Sample, text: str, clips: Sequence[Clip], images: Sequence[Picture], encoder: SampleEncoder
) -> Prepared:
    processor = encoder.processor
    for token, count in ((processor.video_token, len(clips)), (processor.image_token, len(images))):
        if text.count(token) != count:
            raise DataError(
                f"{sample.source}: the rendered conversation has {text.count(token)} {token} for {count} file(s)",
                f"remove or reword a literal {token} in the row's text",
            )
    return encoder.prepare(text, clips, images)


def _example(
    sample: Sample, prepared: Prepared, encoder: SampleEncoder, labels: Tensor, measure_changes: bool
) -> Example:
    return Example(
        sample_id=sample.id,
        input_ids=prepared.input_ids,
        labels=labels,
        position_ids=encoder.position_ids(prepared),
        media=prepared.media,
        items=prepared.items,
        spans=_spans(prepared, sample.source),
        changes=encoder.changes(prepared) if measure_changes else (),
    )


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
            "template",
        )
    return tuple(torch.split(places, counts))
