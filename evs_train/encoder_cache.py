"""Device half of `data.cache_features`: what frozen modules say of media is computed once for each, and kept.

A batch comes with a `Piece` for each of its media (`data/features.py`). What is in it is taken; otherwise the encoder
runs on this medium alone, and a thread writes what it said. Where the projector is trained, the tower's outputs are
kept, and the projector runs over all of them at once, with gradient, as `Family.encode` would run it. Where it is
frozen, too, what is kept are the features behind it, and nothing is left to run.

Invariant: a batch's features do not depend on what was found and what was computed, since frozen modules always see one
medium at a time. Cost: where the projector is trained, a medium that is computed goes through it once more, without
gradient; writing waits for the disk when two media are waiting already.
The loader's half, which skips decoding, is `data/rows.py`. Which tokens stay is decided behind this (`prune.py`).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
from collections import Counter, deque
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from evs_train.config import Part, Recipe
from evs_train.data.chat import Kind, Media
from evs_train.data.features import PIECES, FeatureStore, Piece, Stored
from evs_train.errors import RecipeError
from evs_train.models.base import Encoding, Family, Features
from evs_train.models.tuning import part_of
from evs_train.redaction import redact

COUNTS = ("hits", "misses", "bytes_read", "bytes_written", "not_written")
_PACKAGES = ("evs-train", "torch", "torchvision", "transformers", "decord2", "av", "pillow")
_MOST_WAITING = 2

_log = logging.getLogger(__name__)


def open_store(recipe: Recipe, family: Family, model: PreTrainedModel) -> FeatureStore:
    """The store of what this model's frozen modules say under this recipe. Every process must call it.

    Raises:
        RecipeError: the folder cannot be written.
    """
    section = recipe.data.cache_features
    assert section is not None
    data = recipe.data
    moving: tuple[Part, ...] = ("language_model",)
    if recipe.tuning.trains_projector:
        moving = ("language_model", "projector")
    settings = {
        "without": moving,
        "weights": _digest(model, family, moving),
        "dtype": recipe.model.dtype,
        "attn_implementation": recipe.model.attn_implementation,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor": family.fingerprint(),
        "decoding": [data.backend, data.frames_fps, data.verify],
        "refused": [data.max_pixels, data.max_video_seconds, data.max_video_frames],
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    path = Path(section.path)
    try:
        return FeatureStore.of(path.absolute(), int(section.max_gib * 2**30), settings)
    except OSError as error:
        raise RecipeError(
            f"data.cache_features.path: {path} cannot be written: {error.strerror}", "name a folder that can be"
        ) from error


def check_family(family: Family) -> None:
    """Whether what a family's tower says can be kept.

    Raises:
        RecipeError: it has no such code, or the tower says something else each time it is asked.
    """
    if not family.projector_entries:
        raise RecipeError(f"data.cache_features is not possible with {family.model_type}", "leave the key out")
    active = {name: p for name, p in family.config.vision_config.to_dict().items() if "drop" in name and p}
    if active:
        raise RecipeError(
            f"data.cache_features: the vision tower of {family.model_type} drops at random ({active}), so what it says "
            "of a file is not the same twice",
            "set these to 0 in the checkpoint's config.json, or leave the key out",
        )


def _digest(model: nn.Module, family: Family, without: Collection[Part]) -> str:
    """Hash of all weights outside of some parts."""
    digest = xxhash.xxh3_128()
    named = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in sorted(named, key=lambda one: one[0]):
        if part_of(name, family) not in without:
            with _whole(tensor):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _whole(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes a parameter that ZeRO-3 has partitioned whole; every process must enter it."""
    if not (is_deepspeed_zero3_enabled() and isinstance(tensor, nn.Parameter)):
        return contextlib.nullcontext()
    import deepspeed  # noqa: PLC0415 (imported late: it is slow)

    gathered: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([tensor])
    return gathered


class Writer:
    """Writes entries in a thread, until one does not fit or cannot be written; training goes on without.

    `counts`: of `COUNTS`, what the thread did since the start.
    """

    def __init__(self, store: FeatureStore) -> None:
        self.store = store
        self.counts: Counter[str] = Counter()
        # Its thread starts with the first entry, when the loader has forked its processes.
        self._executor = ThreadPoolExecutor(1, "feature-writer")
        self._waiting: deque[Future[None]] = deque()
        self._stopped = False

    def put(self, key: str, stored: Stored) -> bool:
        """Have an entry written, unless it is there; False: it will not be. Waits while `_MOST_WAITING` others wait.

        Its outputs may be on any device.
        """
        if not self._stopped and not self.store.has(key):
            self._wait(_MOST_WAITING - 1)
            outputs, arrived = _to_host(stored.outputs)
            self._waiting.append(self._executor.submit(self._write, key, Stored(outputs, stored.facts), arrived))
        return not self._stopped

    def close(self) -> None:
        """Wait until everything is written."""
        self._wait(0)
        self._executor.shutdown()

    def _wait(self, most: int) -> None:
        """Until so many entries wait. Raises what the thread has raised."""
        while len(self._waiting) > most:
            self._waiting.popleft().result()

    def _write(self, key: str, stored: Stored, arrived: Callable[[], None]) -> None:
        arrived()
        size = None
        if not self._stopped:
            try:
                size = self.store.write(key, stored)
            except OSError as error:
                self._stop(f"cannot be written: {error}")
            else:
                if size is None:
                    gib = self.store.max_bytes / 2**30
                    self._stop(f"holds {gib:g} GiB (max_gib) and is full; folders of other settings in it may be old")
        self.counts["not_written"] += size is None
        self.counts["bytes_written"] += size or 0

    def _stop(self, why: str) -> None:
        self._stopped = True
        _log.warning(
            "data.cache_features: %s %s. What is not in it is computed each time.", redact(str(self.store.path)), why
        )


def _to_host(outputs: list[Tensor]) -> tuple[list[Tensor], Callable[[], None]]:
    """Copies of tensors in the host's memory, and what waits for them. Nothing waits here."""
    if not outputs[0].is_cuda:
        return outputs, lambda: None
    copies = [torch.empty_like(one, device="cpu", pin_memory=True).copy_(one, non_blocking=True) for one in outputs]
    done = torch.cuda.Event()
    done.record()
    return copies, done.synchronize


@dataclass
class EncoderCache:
    """Encodes the media of batches whose rows were read with `store`.

    Attributes:
        projector_trains: the tower's outputs are kept, and in training every rank projects at least one medium (a blank
            one, of which nothing stays), or its gradients would be missing elsewhere. Otherwise features are kept.
        equal_calls: all ranks must call tower and projector equally often (see `EvsHook`).
    """

    store: FeatureStore
    family: Family
    model: PreTrainedModel
    projector_trains: bool = False
    equal_calls: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    _blanks: dict[Kind, tuple[Media, list[Tensor]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.writer = Writer(self.store)
        self._written: Counter[str] = Counter()

    def encode(self, media: Media, training: bool) -> Encoding:
        """Features of all media of a batch, and of blanks that were projected beside them."""
        encoded: dict[Kind, list[Features]] = {"image": [], "video": []}
        blanks: list[tuple[Kind, Features]] = []
        pieces: dict[Kind, list[Piece]] = {kind: media.get(name, []) for kind, name in PIECES.items()}
        more_towers, more_projections = self._missing(pieces, training)
        for kind, of_kind in pieces.items():
            outputs = [self._outputs(piece, kind) for piece in of_kind]
            for _ in range(more_towers[kind]):
                self._computed(self._blank(kind)[0], kind)
            if outputs and self.projector_trains:
                outputs = self.family.project(self.model, media, kind, outputs)
            encoded[kind] = outputs
            for _ in range(more_projections[kind]):
                blank, said = self._blank(kind)
                # A slice of length 0 adds no token, and its backward gives the projector exact zeros.
                blanks += [
                    (kind, [layer[:0] for layer in one]) for one in self.family.project(self.model, blank, kind, [said])
                ]
        return encoded, blanks

    def metrics(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Counts since the last call, summed over ranks by `reduce(tensor)`. Called on every rank."""
        written, self._written = self._written, self.writer.counts.copy()
        now = self.counts + self._written
        now.subtract(written)
        self.counts.clear()
        mine = torch.tensor([now[name] for name in COUNTS], dtype=torch.float64, device=device)
        return {f"data/feature_cache_{name}": value for name, value in zip(COUNTS, reduce(mine).tolist(), strict=True)}

    def _outputs(self, piece: Piece, kind: Kind) -> list[Tensor]:
        if "outputs" in piece:
            outputs: list[Tensor] = piece["outputs"]
            self.counts["hits"] += 1
            self.counts["bytes_read"] += sum(one.nbytes for one in outputs)
            return outputs
        self.counts["misses"] += 1
        outputs = self._computed(piece["inputs"], kind)
        if not self.writer.put(piece["key"], Stored(outputs, piece["facts"])):
            self.counts["not_written"] += 1
        return outputs

    @torch.no_grad()
    def _computed(self, medium: Media, kind: Kind) -> list[Tensor]:
        """What is kept of one medium."""
        if self.projector_trains:
            return self.family.tower(self.model, medium, kind)
        (features,) = self.family.encode(self.model, medium, kind)
        return features

    def _missing(self, pieces: dict[Kind, list[Piece]], training: bool) -> tuple[Counter[Kind], Counter[Kind]]:
        """How often tower and projector must run on blanks beside this rank's own media, by kind."""
        towers: Counter[Kind] = Counter()
        projections: Counter[Kind] = Counter()
        if training and self.equal_calls:
            for kind in PIECES:
                self._blank(kind)  # on every rank in its first step, or not at all
            own = [sum("outputs" not in piece for piece in of_kind) for of_kind in pieces.values()]
            own += [
                self.family.num_projections(kind, len(of_kind)) if self.projector_trains else 0
                for kind, of_kind in pieces.items()
            ]
            most = torch.tensor(own, device=next(self.model.parameters()).device)
            torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
            missing = [wanted - mine for wanted, mine in zip(most.tolist(), own, strict=True)]
            towers.update(dict(zip(pieces, missing[: len(pieces)], strict=True)))
            projections.update(dict(zip(pieces, missing[len(pieces) :], strict=True)))
            some_media = bool(sum(own)) or bool(sum(missing))
        else:
            some_media = any(pieces.values())
        if training and self.projector_trains and not some_media:
            projections["video"] = 1
        return towers, projections

    def _blank(self, kind: Kind) -> tuple[Media, list[Tensor]]:
        """A blank medium and what is kept of such a one; computed once."""
        if kind not in self._blanks:
            media = send_to_device(self.family.blank(kind), next(self.model.parameters()).device)
            self._blanks[kind] = media, self._computed(media, kind)
        return self._blanks[kind]
