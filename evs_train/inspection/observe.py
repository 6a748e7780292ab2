"""What a checkpoint keeps of one video: its choice at each rate, and the scores that lead to it.

Invariant: nothing is chosen here. The video goes through the family's processor and encoder as in `PrunedModel`, the
tensor that decides is `EvsHook.scored`, the choice is the pruner's, and the scores are `evs.dissimilarity` of the same
tensor, whichever pruner it is.
Cost: the vision tower and projector over the sampled frames, once for all rates; the clip as sampled stays in memory.
Of the language model one layer and the embeddings are loaded, and nothing runs.
Not here: drawing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from evs_train import evs
from evs_train.checkpoint import EXPORT_RECORD
from evs_train.collate import seed_of
from evs_train.data.chat import build_prompt
from evs_train.data.manifest import Sample
from evs_train.data.sources import Source, name_of
from evs_train.data.video import Clip, read_video
from evs_train.errors import RecipeError
from evs_train.generation import PrunedModel
from evs_train.inspection.options import DTYPES, Dtype, InspectOptions
from evs_train.models.loading import load_config
from evs_train.prune import EvsHook, to_device
from evs_train.pruners.base import Video


@dataclass(frozen=True)
class Observation:
    """One video as one checkpoint prunes it. T temporal units of h x w tokens.

    Attributes:
        clip: the sampled frames.
        frames_per_unit: frames in one unit; the last one may have fewer.
        rates: R pruning rates.
        kept: (R, T, h, w) bool, where a token is kept and seen.
        scores: (T, h, w) float32, the dissimilarity of each token; unit 0 holds `evs.FIRST_UNIT_SCORE`.
        scored_as: by which tensor and in which dtype, in words.
    """

    clip: Clip
    frames_per_unit: int
    rates: tuple[float, ...]
    kept: NDArray[np.bool_]
    scores: NDArray[np.float32]
    scored_as: str

    @property
    def counts(self) -> NDArray[np.int64]:
        """(R, T) kept tokens of each unit."""
        counts: NDArray[np.int64] = self.kept.sum(axis=(2, 3), dtype=np.int64)
        return counts

    @property
    def num_units(self) -> int:
        return len(self.scores)

    @property
    def tokens_per_unit(self) -> int:
        return int(self.scores[0].size)

    def seconds(self, unit: int) -> float:
        """When the first frame of a unit begins."""
        return float(self.clip.timestamps[unit * self.frames_per_unit])


def load(options: InspectOptions) -> PrunedModel:
    """The encoder of the checkpoint that the options name, with the sampling and scores of an export.

    Raises:
        ModelError: the checkpoint cannot be used.
        RecipeError: a data or model key has a wrong value.
    """
    try:
        return PrunedModel.load(
            options.checkpoint,
            dtype=options.dtype or own_dtype(options),
            method=options.method,
            data=options.data,
            encoder_only=True,
            **options.model,
        )
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}".removeprefix(": ") for fault in error.errors()]
        raise RecipeError("; ".join(faults), "docs/recipe.md lists the keys of data and model") from error


def own_dtype(options: InspectOptions) -> Dtype:
    """The dtype that an export was trained in; of another checkpoint the one that its config.json says.

    Anything but float32 is read as bfloat16, float16 too: this package trains in one of the two.
    """
    record = Path(options.checkpoint) / EXPORT_RECORD
    if record.is_file():
        return DTYPES[json.loads(record.read_text(encoding="utf-8"))["recipe"]["model"]["dtype"]]
    trusted = options.model.get("trust_remote_code") is True
    config = load_config(options.checkpoint, options.model.get("revision"), trusted)
    said = str(config.dtype or config.get_text_config().dtype).removeprefix("torch.")
    return DTYPES.get(said, "bfloat16")


def rates_of(options: InspectOptions, model: PrunedModel) -> tuple[float, ...]:
    """The rates asked for, or the checkpoint's own. Raises RecipeError where there is neither."""
    if options.rates is not None:
        return options.rates
    if not model.trained_rate:
        raise RecipeError(f"{options.checkpoint} says no video_pruning_rate in its config.json", "add rate=0.75")
    return (model.trained_rate,)


@torch.inference_mode()
def observe(model: PrunedModel, source: Source, rates: Sequence[float]) -> Observation:
    """Encode one video and see what is kept of it at each rate, uncapped as serving prunes.

    Raises:
        MediaError: the video cannot be read.
    """
    clip = read_video(source, model.sampling, decoding=model.decoding)
    turn = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Describe the video."}]}
    sample = Sample("inspect", name_of(source), (turn,), (source,), ())
    needs_changes = model.pruner.needs_changes
    prompt = build_prompt(
        sample, [clip], [], model.family, template_kwargs=model.template_kwargs, measure_changes=needs_changes
    )
    (item,) = prompt.items
    media = to_device(model.family.merge_media([prompt.media]), model.model.device)
    (features,) = model.family.encode(model.model, media, "video")
    hook = EvsHook(model.family, model.model, engine_score=model.engine_score, float32_score=model.float32_score)
    scored = hook.scored(item, features)  # (T, N, D)
    grid = (item.num_units, item.height, item.width)
    kept = np.zeros((len(rates), item.num_tokens), dtype=np.bool_)
    change = prompt.changes[0].to(scored.device) if needs_changes else None
    video = Video(scored, seed_of(0, prompt.sample_id, 0), change)
    for of_rate, rate in zip(kept, rates, strict=True):
        of_rate[model.pruner.choose(video, rate).visible.cpu().numpy()] = True
    score = "engine" if model.engine_score else "embeds"
    return Observation(
        clip=clip,
        frames_per_unit=-(-len(clip.frames) // item.num_units),
        rates=tuple(rates),
        kept=kept.reshape(-1, *grid),
        scores=evs.dissimilarity(scored).float().view(grid).cpu().numpy(),
        scored_as=f"with evs.score={score} in {str(scored.dtype).removeprefix('torch.')}",
    )
