"""Efficient Video Sampling as the serving engines have it: `evs_train/evs.py`."""

from __future__ import annotations

from dataclasses import dataclass

from evs_train import evs
from evs_train.pruners.base import Choice, Pruner, Video


@dataclass(frozen=True)
class Evs(Pruner):
    """Keep the tokens that differ most from the one at the same place a unit before (arXiv 2510.14624)."""

    def choose(self, video: Video, pruning_rate: float) -> Choice:
        return Choice(evs.select_tokens(video.embeds, pruning_rate))


PRUNER = Evs
EVS = Evs()
"""The default of whatever prunes."""
