"""What a pruner is: a rule for how many tokens of a video stay, and one for which, and in what they are merged.

Invariant of every pruner: how many stay follows from (T, N, rate) in Python numbers, so the host plans all shapes; the
choice has fixed shapes and does not make the host wait for the device; it depends on nothing but its arguments.
This module does not know batches or models; `prune.py` moves what is chosen.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evs_train import evs


@dataclass(frozen=True)
class Video:
    """What a pruner may look at.

    Attributes:
        embeds: (T, N, D) post-projector embeddings, in the dtype of the scores.
        seed: of draws at random; the same in every pass over the same row of the same step.
        change: (T, N) float32 mean absolute change of each token's pixels to the unit before, 0 in unit 0; there for
            pruners that need it (`Pruner.needs_changes`).
    """

    embeds: Tensor
    seed: int = 0
    change: Tensor | None = None

    @property
    def num_units(self) -> int:
        return self.embeds.shape[0]

    @property
    def tokens_per_unit(self) -> int:
        return self.embeds.shape[1]


@dataclass(frozen=True)
class Choice:
    """Which tokens of one video stay.

    Attributes:
        index: (K,) int64, ascending: places of the kept tokens among the flattened T * N.
        groups: (T * N,) int64, for each token the number (0 to K - 1) of the kept one that it is averaged into, K where
            it is dropped; a kept token is in its own group. None: kept tokens stay as they are.
        seen: (K,) bool: kept tokens that attention sees. None: all.
    """

    index: Tensor
    groups: Tensor | None = None
    seen: Tensor | None = None

    @property
    def visible(self) -> Tensor:
        """Places of the kept tokens that attention sees, for pictures: where some are hidden the host must wait."""
        return self.index if self.seen is None else self.index[self.seen]

    def merged(self, rows: Tensor) -> Tensor:
        """(K, D) features of the kept tokens, from those of all: (T * N, D).

        Means are taken in float32. On a GPU the order of their sums is not fixed, so neither are their last bits.
        """
        if self.groups is None:
            return rows.index_select(0, self.index)  # its gradient needs no sort, as that of an index in brackets does
        sums = rows.new_zeros((len(self.index) + 1, rows.shape[1]), dtype=torch.float32)
        sums = sums.index_add(0, self.groups, rows.float())
        counts = sums.new_zeros(len(sums)).index_add(0, self.groups, sums.new_ones(len(rows)))
        return (sums / counts[:, None])[:-1].to(rows.dtype)


@dataclass(frozen=True)
class Selection:
    """Of the video tokens that stay, what goes on behind a layer of the language model (`question.py`).

    Attributes:
        share: of those tokens, above 0 and at most 1.
        depth: of the layer, as a share of all layers.
    """

    share: float
    depth: float

    def num_selected(self, num_retained: int) -> int:
        return math.ceil(self.share * num_retained - 1e-9)  # 0.07 of 100 is 7

    def layer(self, num_layers: int) -> int:
        """Its number, counted from 0."""
        return int(self.depth * num_layers + 1e-9)


class Pruner(ABC):
    """One way to prune a video. A subclass is a frozen dataclass: its fields are the recipe's options.

    Class attributes:
        hides: it keeps tokens that attention does not see (`Choice.seen`), which needs a mask: no flash attention, and
            no recurrent layers.
    """

    hides: ClassVar[bool] = False

    @property
    def needs_changes(self) -> bool:
        """It looks at `Video.change`, which is measured where videos are decoded. Default: no."""
        return False

    def num_retained(self, num_units: int, tokens_per_unit: int, pruning_rate: float) -> int:
        """How many tokens stay. Default: as many as EVS keeps, so that methods are compared at equal numbers.

        Args, Raises: as `evs.retained_tokens`.
        """
        return evs.retained_tokens(num_units, tokens_per_unit, pruning_rate)

    @property
    def selection(self) -> Selection | None:
        """What the language model itself drops of what stays, at rates above 0. It cannot be trained."""
        return None

    @abstractmethod
    def choose(self, video: Video, pruning_rate: float) -> Choice:
        """Which tokens of a video stay, `num_retained` of them. Carries no gradient."""


def highest(scores: Tensor, count: int) -> Tensor:
    """(count,) int64, ascending: places of the highest scores (M,); of equal ones the earlier wins."""
    return torch.argsort(scores, descending=True, stable=True)[:count].sort().values
