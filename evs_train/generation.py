"""Answers of a model that sees pruned video, in plain transformers: what evaluation needs, and a check of a checkpoint.

    model = PrunedModel.load("runs/tiny/export")
    model.answer([{"role": "user", "content": [{"type": "video", "video": "clip.mp4"},
                                               {"type": "text", "text": "What moves?"}]}], pruning_rate=0.75)

The prompt is decoded, encoded and pruned as in training, and `generate` of transformers goes on from there: it takes
encoder outputs and positions from outside. New tokens are numbered on from the last token of the prompt.

Invariant: greedy answers are those of repeated full forwards over the pruned prompt. One prompt at a time: recurrent
layers would read padding into their state. Cost: one prefill of the retained tokens; no copy of the weights.
This is no serving engine: there is no batching across requests, and no paged cache.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from evs_train.checkpoint import EXPORT_RECORD
from evs_train.collate import Collator
from evs_train.config import EvsSection, ModelSection, Positions
from evs_train.data.batches import Examples
from evs_train.data.chat import Example, Kind, Media, build_prompt
from evs_train.data.decoding import Decoding
from evs_train.data.manifest import read_prompt
from evs_train.data.sampling import FrameSampling
from evs_train.data.template import IGNORE_INDEX
from evs_train.data.video import decoding_options, frame_sampling, read_image, read_video
from evs_train.data_config import DataSection
from evs_train.errors import RecipeError
from evs_train.inputs import check_pruner
from evs_train.models.base import Family, Features
from evs_train.models.loading import load_encoder, load_family, load_weights
from evs_train.prune import KINDS, EvsHook, to_device
from evs_train.pruners import Method, build_pruner, method_name
from evs_train.pruners.base import Pruner, Selection
from evs_train.pruners.evs import EVS
from evs_train.question import Asked, check_selection, selecting
from evs_train.rates import Rates
from evs_train.recipe import parse_recipe
from evs_train.samplers import build_sampler

Encoded = dict[Kind, list[Features]]
"""Features of all images and all videos of a prompt, each in its order."""


@dataclass
class PrunedModel:
    """A checkpoint with its processor, ready to answer at any pruning rate.

    Attributes:
        trained_rate: `video_pruning_rate` of the checkpoint's config.json, or 0; the rate when a call names none. Of
            an export that was not trained with EVS, the one in its record.
        sampling: how frames are taken from videos.
        template_kwargs: variables of the chat template.
        engine_score, float32_score, pruner: as of `EvsHook`.
        decoding: decoder and limits.
    """

    family: Family
    model: PreTrainedModel
    trained_rate: float = 0.0
    sampling: FrameSampling = field(default_factory=lambda: FrameSampling(fps=2.0))
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    engine_score: bool = True
    float32_score: bool = False
    decoding: Decoding = field(default_factory=Decoding)
    pruner: Pruner = EVS

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        device: str | torch.device | None = None,
        positions: Positions | None = None,
        method: Method | None = None,
        data: Mapping[str, Any] | None = None,
        encoder_only: bool = False,
        **model: Any,
    ) -> PrunedModel:
        """Load a checkpoint. An export says how it was trained: its positions, scores and sampling are the defaults.

        Args:
            checkpoint: directory or hub name.
            dtype: of the weights, the computation and the scores; see `model.dtype` of a recipe.
            device: default: the GPU if there is one.
            positions: `evs.positions`; of a checkpoint that is no export, "preserve".
            method: `evs.method`; of a checkpoint that is no export, "evs".
            data: keys of a recipe's `data` section that say how videos are sampled and processed.
            encoder_only: load no more of the language model than its first layer: it encodes, and cannot answer.
            model: other keys of a recipe's `model` section.

        Raises:
            ModelError, RecipeError: as `load_family` and `load_weights`.
        """
        section = ModelSection(path=str(checkpoint), dtype=dtype, **model)
        if section.attn_implementation == "flash_attention_2":
            raise RecipeError("flash_attention_2 does not generate from pruned video", "use sdpa")
        evs, options = settings_of(checkpoint, data)
        family = load_family(section, options, positions or evs.positions)
        pruner = build_pruner(method or evs.method)
        check_pruner(pruner, family, section.attn_implementation)
        if pruner.selection is not None:
            check_selection(pruner.selection, family)
        says_rate = family.config.to_dict()
        if method_name(evs.method) != "evs":  # it is an export, whose config.json speaks to engines, of EVS alone
            says_rate = json.loads((Path(checkpoint) / EXPORT_RECORD).read_text(encoding="utf-8"))
        trained_rate = float(says_rate.get("video_pruning_rate") or 0.0)
        plain = (load_encoder if encoder_only else load_weights)(section, family.config, getattr(torch, dtype))
        plain.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(
            family,
            plain,
            trained_rate,
            frame_sampling(options),
            options.template_kwargs,
            engine_score=evs.score == "engine",
            float32_score=evs.score_dtype == "float32",
            decoding=decoding_options(options),
            pruner=pruner,
        )

    def answer(self, messages: Sequence[dict[str, Any]], pruning_rate: float | None = None, **options: Any) -> str:
        """The model's answer to OpenAI-style messages that name local files; `options` as for `generate`.

        Raises:
            DataError, MediaError: the messages are malformed, or a file cannot be read.
        """
        prompt = self.prompt(messages)
        rate = self.trained_rate if pruning_rate is None else pruning_rate
        new = self.generate(prompt, rate, **options)
        text: str = self.family.processor.tokenizer.decode(new, skip_special_tokens=True)
        return text

    def prompt(self, messages: Sequence[dict[str, Any]], media_root: str | Path = ".") -> Example:
        """Messages with their media, decoded and tokenized, up to where the answer begins."""
        sample = read_prompt(messages, media_root)
        clips = [read_video(path, self.sampling, decoding=self.decoding) for path in sample.videos]
        images = [read_image(path, decoding=self.decoding) for path in sample.images]
        return build_prompt(
            sample,
            clips,
            images,
            self.family,
            template_kwargs=self.template_kwargs,
            measure_changes=self.pruner.needs_changes,
        )

    def inputs(self, prompt: Example, pruning_rate: float) -> dict[str, Any]:
        """Arguments of the model's forward for one prompt, its videos encoded and pruned; all rows of shape (1, K)."""
        return self.inputs_of_rows([prompt], pruning_rate, self.encode(prompt))

    @torch.no_grad()  # not inference_mode: under ZeRO-3 weights that are gathered in it could not be trained afterwards
    def encode(self, prompt: Example) -> Encoded:
        """What the encoder says of the media of one prompt. It does not depend on the rate."""
        media = to_device(prompt.media, self.model.device)
        return {
            kind: self.family.encode(self.model, media, kind) if self.family.num_encoder_calls(media, kind) else []
            for kind in KINDS
        }

    @contextlib.contextmanager
    def prepared(self, prompt: Example, pruning_rate: float, encoded: Encoded) -> Iterator[dict[str, Any]]:
        """`inputs`, for a call of the model or its `generate`; within, it also drops what the pruner selects in it."""
        selection, videos = self.selection(pruning_rate), [item.kind == "video" for item in prompt.items]
        if selection is None or not any(videos):
            yield self.inputs_of_rows([prompt], pruning_rate, encoded)
            return
        pruned, is_video = self._pruned([prompt], pruning_rate, encoded)
        ids, length = pruned["input_ids"][0], pruned["input_ids"].shape[1]
        last = max(int(span[-1]) for span, is_one in zip(prompt.spans, videos, strict=True) if is_one)
        behind = torch.arange(length, device=ids.device) >= length - (len(prompt.input_ids) - 1 - last)
        placeholders = prompt.input_ids[torch.cat(prompt.spans)].to(ids.device)
        is_text = ~torch.isin(ids, placeholders)  # a newline behind the video has its placeholder
        asked = Asked(is_video[0].nonzero()[:, 0], (behind & is_text).nonzero()[:, 0], length)
        with selecting(self.model, selection, asked):
            yield pruned

    def selection(self, pruning_rate: float) -> Selection | None:
        """What is dropped inside the language model at a rate: at 0 nothing, since that is dense."""
        return self.pruner.selection if pruning_rate > 0 else None

    def inputs_of_rows(self, rows: Sequence[Example], pruning_rate: float, encoded: Encoded) -> dict[str, Any]:
        """Arguments of the model's forward for rows that show the same media, padded on the right, pruned alike.

        Args:
            rows: examples with the media that `encoded` comes from.
            pruning_rate: 0 <= rate < 1, not capped.
            encoded: of `encode`; each row gets it.
        """
        return self._pruned(rows, pruning_rate, encoded)[0]

    @torch.no_grad()
    def _pruned(self, rows: Sequence[Example], pruning_rate: float, encoded: Encoded) -> tuple[dict[str, Any], Tensor]:
        """Arguments of the forward, and where its rows have video tokens (B, K) bool."""
        collator = Collator(
            rates=Rates(build_sampler(pruning_rate), cap=False),
            pad_token_id=self.family.pad_token_id,
            merge_media=lambda media: {},
            sequential=self.family.positions == "sequential",
            pruner=self.pruner,
        )
        hook = EncodedHook(
            self.family,
            self.model,
            self.pruner,
            engine_score=self.engine_score,
            float32_score=self.float32_score,
        )
        hook.encoded = {kind: features * len(rows) for kind, features in encoded.items()}
        batch = to_device(collator([Examples(0, list(rows))]), self.model.device)
        labels = batch["labels"].flatten().fill_(IGNORE_INDEX)  # they go where their tokens go, and are not looked at
        batch["labels"] = labels.index_fill(0, batch["index"]["video"], 1).view_as(batch["labels"])
        pruned = hook.prune(batch)
        return pruned, pruned.pop("labels") == 1

    @torch.no_grad()
    def generate(self, prompt: Example, pruning_rate: float, encoded: Encoded | None = None, **options: Any) -> Tensor:
        """Continue one prompt whose videos are pruned.

        Args:
            prompt: of `prompt`, or any example; its labels are not looked at.
            pruning_rate: 0 <= rate < 1, applied as serving does: not capped for short videos.
            encoded: of `encode`, if it was called before.
            options: those of transformers' `generate`, such as `max_new_tokens`; greedy unless `do_sample=True`.

        Returns:
            (N,) int64 new tokens, the end-of-turn token included.

        Raises:
            RecipeError: the rate is out of range.
        """
        with self.prepared(prompt, pruning_rate, encoded or self.encode(prompt)) as pruned:
            out = self.model.generate(**pruned, **{"do_sample": False, "use_cache": True, **options})
        new: Tensor = out[0, pruned["input_ids"].shape[1] :]
        return new


@dataclass
class EncodedHook(EvsHook):
    """A hook that is given what the encoder said, instead of running it."""

    encoded: Encoded = field(default_factory=dict)

    def _encode(self, media: Media, training: bool) -> tuple[Encoded, list[tuple[Kind, Features]]]:
        return self.encoded, []


_SAMPLING = (
    "fps", "num_frames", "min_frames", "max_frames", "video_kwargs", "image_kwargs", "template_kwargs",
)  # fmt: skip


def settings_of(checkpoint: str | Path, data: Mapping[str, Any] | None = None) -> tuple[EvsSection, DataSection]:
    """How a checkpoint is pruned and how its videos are sampled, as `PrunedModel.load` takes it. Reads no weights."""
    evs, trained_on = _trained_with(Path(checkpoint))
    given = dict(data or {})
    if {"fps", "num_frames"} & given.keys():  # one unsets the other
        trained_on = {key: value for key, value in trained_on.items() if key not in ("fps", "num_frames")}
    return evs, DataSection(rows=["none"], **{**trained_on, **given})


def _trained_with(checkpoint: Path) -> tuple[EvsSection, dict[str, Any]]:
    """`evs` section and sampling of the recipe that an export came from; the defaults of any other checkpoint."""
    file = checkpoint / EXPORT_RECORD
    if not file.is_file():
        return EvsSection(), {}
    recipe = parse_recipe(json.loads(file.read_text(encoding="utf-8"))["recipe"], str(file))
    return recipe.evs, {key: getattr(recipe.data, key) for key in _SAMPLING}
