"""The order in which rows are shown: a pure function of (seed, number of rows), whatever reads it.

A run is one stream of *draws* 0, 1, 2, ...: draw d shows the row that epoch d // n of a seeded shuffle puts there.
Where that row cannot be shown, another one is, which again follows from (seed, draw) alone; the other draws show what
they would have shown. Ranks, workers, batches and resumption only decide who reads a draw, never what it is.

Cost: one permutation of the row numbers per epoch. How draws become batches is in `schedule.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# These keep the random streams apart: shuffle, stand-ins, shuffle within a source of a mixture.
_ORDER_STREAM = 0x0DE2
_STAND_IN_STREAM = 0x57A7
_SOURCE_STREAM = 0x50CE

Shares = tuple[tuple[int, int], ...]
"""(rows, rows shown per epoch) of each source of a weighted mixture; empty if an epoch shows each row once."""


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, epoch: int, shares: Shares = ()) -> np.ndarray:
    """Shuffled row numbers of one epoch, (num_samples,) int64: each once, or as often as `shares` have it."""
    order = np.random.default_rng([seed, _ORDER_STREAM, epoch]).permutation(num_samples)
    return weighted_rows(shares, seed, epoch)[order] if shares else order


def weighted_rows(shares: Shares, seed: int, epoch: int) -> np.ndarray:
    """Row numbers that one epoch of a weighted mixture shows, source by source, int64.

    A source is a stream of its own: shuffled passes over its rows one after the other, of which each epoch takes the
    next so many. So within a pass no row comes again before all others of its source have come.

    Args:
        shares: (rows, rows per epoch) of each source; a source's row numbers follow those of the one before.
    """
    taken, first = [], 0
    for source, (num_rows, per_epoch) in enumerate(shares):
        places = np.arange(epoch * per_epoch, (epoch + 1) * per_epoch)
        passes = {
            number: np.random.default_rng([seed, _SOURCE_STREAM, source, number]).permutation(num_rows)
            for number in range(places[0] // num_rows, places[-1] // num_rows + 1)
        }
        taken.append(first + np.concatenate(list(passes.values()))[places - places[0] // num_rows * num_rows])
        first += num_rows
    return np.concatenate(taken)


@dataclass(frozen=True)
class DrawOrder:
    """Which row each draw shows.

    Attributes:
        num_rows: rows that there are, and draws of an epoch.
        seed: of the recipe.
        shares: see `weighted_rows`; empty without weights.
    """

    num_rows: int
    seed: int
    shares: Shares = ()

    def row(self, draw: int, attempt: int = 0) -> int:
        """Row number that a draw shows, or tries as number `attempt` when the ones before it cannot be shown.

        A stand-in is the row of some draw of the same epoch, so it comes from what the epoch is made of.
        """
        epoch, place = divmod(draw, self.num_rows)
        if attempt:
            generator = np.random.default_rng([self.seed, _STAND_IN_STREAM, draw, attempt])
            place = int(generator.integers(self.num_rows))
        return int(epoch_order(self.num_rows, self.seed, epoch, self.shares)[place])
