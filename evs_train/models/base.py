"""What a model family must say of itself, and nothing more.

An adapter knows how a processor's output becomes token ids and encoder inputs, how many units and tokens each video
has (host integers), which positions the tokens take, and how the encoder is called. Pruning, batching and training know
none of this; adding a family is one file beside this one and one line in `models/__init__.py`.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from evs_train.config import Part, Positions
from evs_train.data.chat import PIXELS, Kind, Media, MediaItem, Picture, Prepared
from evs_train.data.features import inverse, memory_order
from evs_train.data.video import Clip
from evs_train.models.changes import of_frames

Features = list[Tensor]
"""Everything the encoder says of one video or image, each (num_tokens, D): pooled embeddings, then deepstack layers.
Rows that stand behind a video's T * N tokens always stay (LLaVA-OneVision's newline)."""

Encoding = tuple[dict[Kind, list[Features]], list[tuple[Kind, Features]]]
"""Features of all media of a batch by kind, and of the blanks that were encoded beside them."""

GATED_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""`lora_targets` of language models as Llama's: attention and a gated MLP."""

NO_ADAPTER_ON_EXPERTS = (
    "Routed experts and their routers are no linear layers: they get no adapters. (tuning.method=full trains them.)"
)
"""`lora_note` of the families with a mixture of experts."""


class Family(ABC):
    """Adapter of one model family.

    Class attributes:
        model_type: `model_type` of the checkpoint's config.json.
        parts: the module-name prefixes of each trainable part, relative to the plain model.
        unused: module-name prefixes that are always frozen: video never runs them, nothing reads what they make, or
            checkpoints do not store them.
        not_stored: endings of names of parameters and buffers that releases do not store. They are frozen, since what
            was trained into them could not be exported, and the export leaves them out where the base has none.
        not_loaded: beginnings of names of released tensors that transformers does not load; the export passes them on.
        lora_targets: default names of the linear layers that get adapters.
        lora_refused: names of linear layers that must not get one, each with the reason.
        lora_note: what a run with adapters on the language model says at its start: which weights they do not reach.
        end_of_turn: what ends an answer where the release's chat template writes nothing behind it.
        shares_encoder: images and videos run through the same modules, so either one gives all of them a gradient.
        attention_only: tokens meet in attention and nowhere else, so dropping a token equals masking it, and rows can
            be packed. Recurrent layers see a shorter sequence instead, and take no borders between documents.
        position_rules: the values of `evs.positions` that this family has; see `Positions`.
        projector_entries: modules of the projector that take what the vision tower says, in the order of `Features`;
            without them the family cannot keep it (`data.cache_features`).
        reads_pixels: its processor looks at what pixels say, so it cannot be run on stand-ins that have none.
    """

    model_type: ClassVar[str]
    parts: ClassVar[Mapping[Part, tuple[str, ...]]]
    unused: ClassVar[tuple[str, ...]] = ()
    not_stored: ClassVar[tuple[str, ...]] = ()
    not_loaded: ClassVar[tuple[str, ...]] = ()
    lora_targets: ClassVar[tuple[str, ...]]
    lora_refused: ClassVar[Mapping[str, str]] = {}
    lora_note: ClassVar[str] = ""
    end_of_turn: ClassVar[str] = ""
    shares_encoder: ClassVar[bool]
    attention_only: ClassVar[bool] = True
    position_rules: ClassVar[tuple[Positions, ...]] = ("preserve",)
    projector_entries: ClassVar[tuple[str, ...]] = ()
    reads_pixels: ClassVar[bool] = False

    def __init__(
        self,
        config: Any,
        processor: Any,
        video_kwargs: Mapping[str, Any] = {},
        image_kwargs: Mapping[str, Any] = {},
        positions: Positions = "preserve",
    ) -> None:
        self.config = config
        self.processor = processor
        self.video_kwargs = dict(video_kwargs)
        self.image_kwargs = dict(image_kwargs)
        self.positions = positions

    @property
    def pad_token_id(self) -> int:
        tokenizer = self.processor.tokenizer
        return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of what ids and lengths of a row follow from: processor, configuration, options."""
        digest = hashlib.sha256(repr([self.config.to_json_string(), self.video_kwargs, self.image_kwargs]).encode())
        with tempfile.TemporaryDirectory() as folder:
            self.processor.save_pretrained(folder)
            for file in sorted(Path(folder).rglob("*")):
                if file.is_file():
                    digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
        return digest.hexdigest()

    def normalized(self, text: str) -> str:
        """A rendered conversation in which answers open as generation's prompt does. Default: as it is."""
        return text

    @abstractmethod
    def prepare(self, text: str, clips: Sequence[Clip], images: Sequence[Picture]) -> Prepared:
        """Expand the placeholders of one rendered conversation and preprocess its media (see `Prepared`)."""

    def position_ids(self, prepared: Prepared) -> Tensor | None:
        """Positions (P, L) int64 of the unpruned tokens, or None when the model takes none. Runs on the host.

        P is 1 where the model takes (B, L), 3 where it takes (3, B, L).
        """
        return None

    def changes(self, prepared: Prepared) -> tuple[Tensor, ...]:
        """(T, N) float32 of each video: see `changes.py`. Default: pixels are a list of frames (F, C, H, W)."""
        return of_frames(prepared)

    @abstractmethod
    def encode(self, model: Any, media: Media, kind: Kind) -> list[Features]:
        """Encode all videos, or all images, of a batch; one `Features` each, in the order of the batch."""

    @abstractmethod
    def num_encoder_calls(self, media: Media, kind: Kind) -> int:
        """How often `encode` runs the vision tower for this batch."""

    @abstractmethod
    def blank(self, kind: Kind) -> Media:
        """Encoder inputs of the smallest blank video or image (CPU), for ranks whose batch has none."""

    def split_media(self, media: Media, kind: Kind) -> list[Media]:
        """Encoder inputs of each video, or each image, of one row: what `tower` takes. Default: pixels are a list."""
        name = PIXELS[kind]
        return [{name: [pixels]} for pixels in media.get(name, ())]

    @torch.no_grad()
    def tower(self, model: Any, medium: Media, kind: Kind) -> list[Tensor]:
        """What the vision tower says of one video or image: the inputs of the projector's entries, without gradient.

        Their first dimension runs over patches, frames or tiles. Cost: that of `encode` of this medium.
        """
        found: dict[int, Tensor] = {}
        handles = [
            entry.register_forward_pre_hook(lambda _, args, number=number: found.__setitem__(number, args[0]))
            for number, entry in enumerate(self.entries(model))
        ]
        try:
            self.encode(model, medium, kind)
        finally:
            for handle in handles:
                handle.remove()
        return [found[number] for number in range(len(handles))]

    def project(self, model: Any, media: Media, kind: Kind, towers: Sequence[list[Tensor]]) -> list[Features]:
        """What `encode` says of all videos, or all images, of a batch, from what `tower` said of each.

        The projector runs once over all of them, as in `encode`: values and gradients are the same to the bit wherever
        the tower says of each medium alone what it says of several.

        Args:
            media: encoder inputs of the batch; pixels are not looked at and may be missing.
            towers: of each video or image, in the order of the batch.
        """
        layers = []
        for number, outputs in enumerate(zip(*towers, strict=True)):
            rows = self.projected(model, number, joined(outputs)).flatten(0, -2)  # (all tokens, D)
            total = sum(one.numel() for one in outputs)
            layers.append(rows.split([len(rows) * one.numel() // total for one in outputs]))
        return [list(features) for features in zip(*layers, strict=True)]

    def projected(self, model: Any, number: int, outputs: Tensor) -> Tensor:
        """(..., D) what the projector makes of the inputs of its entry `number`. Default: what the entry returns."""
        rows: Tensor = self.entries(model)[number](outputs)
        return rows

    def entries(self, model: Any) -> list[nn.Module]:
        """The modules that `projector_entries` names. Default: each is one module."""
        return [model.get_submodule(name) for name in self.projector_entries]

    @abstractmethod
    def patches_per_token(self, kind: Kind) -> float:
        """How many patches the vision tower's layers see for each token of a video or image."""

    def tower_values(self, kind: Kind) -> float:
        """How many numbers `tower` gives for each token of a video or image. Raises NotImplementedError: see above."""
        raise NotImplementedError(self.model_type)

    def feature_values(self) -> int:
        """How many numbers `encode` gives for each token. Default: a pooled embedding, as wide as the text model."""
        return int(self.config.get_text_config().hidden_size)

    def num_projections(self, kind: Kind, count: int) -> int:
        """How often `project` runs the projector for so many media. Default: once for all."""
        return min(count, 1)

    def encoder_outputs(self, features: Sequence[tuple[Kind, Features]]) -> dict[str, Any]:
        """`mm_encoder_outputs` for the forward, from the retained features of all media in reading order.

        Default: the pooled embeddings, images and videos apart.
        """
        pooled = {kind: tuple(item[0] for of, item in features if of == kind) for kind in get_args(Kind)}
        return {kind: BaseModelOutputWithPooling(pooler_output=embeds) for kind, embeds in pooled.items() if embeds}

    def forward_inputs(
        self, model: Any, inputs: dict[str, Any], features: Sequence[tuple[Kind, Features]]
    ) -> dict[str, Any]:
        """Arguments of the model's forward, from those it would be given without media and the retained features.

        Default: `mm_encoder_outputs` beside them. A forward that knows no such argument gets `inputs_embeds`.
        """
        return {**inputs, "mm_encoder_outputs": self.encoder_outputs(features)}

    def output_embeddings(self, model: Any) -> nn.Module:
        """The layer that turns the last hidden states into logits."""
        head: nn.Module = model.get_output_embeddings()
        return head

    def score_tensor(self, features: Features) -> Tensor:
        """(num_tokens, D) tensor on which serving engines score this family. Default: the pooled embeddings."""
        return features[0]

    @staticmethod
    def merge_media(media: Sequence[Media]) -> Media:
        """Encoder inputs of several samples joined in order: tensors along dimension 0, lists end to end."""
        merged: Media = {}
        for name in sorted({name for one in media for name in one}):
            values = [one[name] for one in media if name in one]
            if len(values) == 1:  # no copy: that of the loader, to shared memory, is enough
                merged[name] = values[0]
            elif isinstance(values[0], Tensor):
                merged[name] = torch.cat(values)
            else:
                merged[name] = [v for value in values for v in value]
        return merged


class OneDimensional(Family):
    """Base of families whose positions are places in the sequence."""

    position_rules: ClassVar[tuple[Positions, ...]] = ("preserve", "sequential")

    def position_ids(self, prepared: Prepared) -> Tensor:
        return torch.arange(len(prepared.input_ids))[None]


def reading_order(
    text: str, placeholders: Mapping[Kind, str], items: Mapping[Kind, Sequence[MediaItem]]
) -> tuple[MediaItem, ...]:
    """Media items in the order in which their placeholders stand in the rendered text."""
    remaining = {kind: iter(of_kind) for kind, of_kind in items.items()}
    kind_of = {placeholder: kind for kind, placeholder in placeholders.items()}
    pattern = "|".join(re.escape(placeholder) for placeholder in kind_of)
    return tuple(next(remaining[kind_of[found]]) for found in re.findall(pattern, text))


def expanded(text: str, texts: Mapping[str, Sequence[str]]) -> str:
    """`text` with each placeholder replaced by the next of its `texts`; placeholders in those are left alone."""
    remaining = {placeholder: iter(of_placeholder) for placeholder, of_placeholder in texts.items()}
    pattern = "|".join(re.escape(placeholder) for placeholder in remaining)
    return re.sub(pattern, lambda found: next(remaining[found[0]]), text)


def frames_tensor(clip: Clip) -> Tensor:
    """Frames of a clip as processors take them: (F, H, W, 3) -> (F, 3, H, W) uint8.

    Of a clip that is a shape only they are on the meta device, on which processors compute shapes.
    """
    if clip.shape_only:
        num_frames, height, width, channels = clip.frames.shape
        return torch.empty((num_frames, channels, height, width), dtype=torch.uint8, device="meta")
    return torch.from_numpy(clip.frames).permute(0, 3, 1, 2)


def split_patches(media: Media, pixels: str, grid: str, *others: str) -> list[Media]:
    """`split_media` where patches of all media stand in one tensor and `grid` (n, 2 or 3) counts those of each."""
    if pixels not in media:
        return []
    counts = media[grid].prod(-1).tolist()
    names = (grid, *others)
    rest = [{name: media[name][place : place + 1] for name in names} for place in range(len(counts))]
    return [{pixels: own, **of_one} for own, of_one in zip(media[pixels].split(counts), rest, strict=True)]


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors along dimension 0, laid out in memory as the first one is: other strides may round otherwise."""
    if len(tensors) == 1:
        return tensors[0]
    order = memory_order(tensors[0])
    return torch.cat([one.permute(order) for one in tensors]).permute(inverse(order))
