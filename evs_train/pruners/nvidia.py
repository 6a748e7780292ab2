"""What NVIDIA trains with: the published rule of EVS as Megatron-LM has it, between features or between pixels.

Read: NVIDIA/Megatron-LM `megatron/core/models/multimodal/efficient_video_sampling.py` (commit fa48608). Its `pairwise`
keeps what lies strictly above the linear q-quantile of all changes of a video to the unit before, unit 0 counting as
255, in float32. Its `iterative` adds changes up since a place was last kept, and takes a quantile in each unit.

Invariant: as many are kept as lie strictly above the quantile of different numbers, n - 1 - floor(q * (n - 1)) of n.
Cost: O(T * N * D) and a sort, in float32: a copy of the embeddings and their differences. `iterative` goes through the
units one after the other, with two small sorts each. `level: pixels` costs the loader a pass over the pixels and the
device nothing.

Differences from the reference, which are all of it that is decided here:
- where changes are equal at the quantile it drops all of them (a still video: everything); here the earlier stay;
- where q > 1 - 1/T it drops every token, unit 0 too; here unit 0 stays whole. At rate 0 it drops one; here none;
- it takes positions in the quantile in float32, here they are Python doubles: a token more or less at most;
- its `iterative` cannot run at that commit (a channel axis is taken for time), so ours follows the intent alone;
- a unit of several frames is compared frame by frame (it never has more than one); pixels are those of the family's
  processor, and what one token covers is an area of the picture cut evenly (`models/changes.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from evs_train import evs
from evs_train.pruners.base import Choice, Pruner, Video, highest

Variant = Literal["pairwise", "iterative"]
Level = Literal["features", "pixels"]
Metric = Literal["l1", "cos"]


@dataclass(frozen=True)
class Nvidia(Pruner):
    """Keep what changed.

    Attributes:
        variant: since the unit before, over the whole video; or since the token was last kept, an equal number of each
            unit but the first, which is kept whole.
        level: between embeddings, or between the pixels that they are made of.
        metric: mean absolute difference, or 1 - cosine (of features alone).
    """

    variant: Variant = "pairwise"
    level: Level = "features"
    metric: Metric = "l1"

    def __post_init__(self) -> None:
        _check("variant", self.variant, get_args(Variant))
        _check("level", self.level, get_args(Level))
        _check("metric", self.metric, get_args(Metric))
        if self.level == "pixels" and self.metric != "l1":
            raise ValueError(f"metric must be l1 between pixels, got {self.metric}")

    @property
    def needs_changes(self) -> bool:
        return self.level == "pixels"

    def num_retained(self, num_units: int, tokens_per_unit: int, pruning_rate: float) -> int:
        """All at rate 0. Otherwise N and the share of each further unit; or the share of the video, N at least."""
        evs.check_arguments(num_units, tokens_per_unit, pruning_rate)
        if pruning_rate == 0:
            return num_units * tokens_per_unit
        if self.variant == "iterative":
            return tokens_per_unit + (num_units - 1) * above_quantile(tokens_per_unit, pruning_rate)
        return max(tokens_per_unit, above_quantile(num_units * tokens_per_unit, pruning_rate))

    def choose(self, video: Video, pruning_rate: float) -> Choice:
        num_units, per_unit = video.num_units, video.tokens_per_unit
        count = self.num_retained(num_units, per_unit, pruning_rate)
        if count == num_units * per_unit:
            return Choice(torch.arange(count, device=video.embeds.device))
        changes = self._changes(video)
        if self.variant == "iterative":
            return Choice(_since_kept(changes, above_quantile(per_unit, pruning_rate)))
        first = torch.full_like(video.embeds[0, :, 0], evs.FIRST_UNIT_SCORE, dtype=torch.float32)
        return Choice(highest(torch.cat([first, changes.flatten()]), count))

    def _changes(self, video: Video) -> Tensor:
        """(T - 1, N) float32, of the units behind the first."""
        if self.level == "pixels":
            assert video.change is not None, "videos were read without measuring how their pixels change"
            return video.change[1:]
        embeds = video.embeds.float()
        if self.metric == "cos":
            return evs.dissimilarity(embeds)[1:]
        return (embeds[1:] - embeds[:-1]).abs().mean(dim=-1)


def above_quantile(count: int, pruning_rate: float) -> int:
    """How many of `count` different numbers lie strictly above their q-quantile with linear interpolation."""
    return count - 1 - int(pruning_rate * (count - 1))


def _since_kept(changes: Tensor, per_unit: int) -> Tensor:
    """Places kept of (T - 1, N) changes and of the unit before them: the largest sums since a place was last kept."""
    place = torch.arange(changes.shape[1], device=changes.device)
    kept, since = [place], torch.zeros_like(changes[0])
    for unit, change in enumerate(changes, start=1):
        since = since + change
        chosen = highest(since, per_unit)
        since = since.index_fill(0, chosen, 0.0)
        kept.append(unit * changes.shape[1] + chosen)
    return torch.cat(kept)


def _check(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


PRUNER = Nvidia
