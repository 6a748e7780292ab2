"""The order in which samples are drawn: a pure function of (seed, number of samples), whatever reads it.

A run is one stream of *draws* 0, 1, 2, ...: draw d belongs to optimizer step d // global_batch, and shows the sample
that epoch d // n of a seeded shuffle puts there. Ranks, workers, micro-batches and resumption only decide who reads a
draw, never what it is, so 1 and 8 processes train on the same rows in the same steps.

Cost: one permutation of the row numbers per epoch; media are read when a draw is read, in the loader's worker.
This module does not batch or prune; see `collate.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from evs_train.data.chat import Example, SampleEncoder, build_example
from evs_train.data.manifest import Sample
from evs_train.data.video import FrameSampling, read_image, read_video
from evs_train.errors import EvsTrainError

_ORDER_STREAM = 0x0DE2  # keeps the shuffle's random stream apart from that of the rates
_SOURCE_STREAM = 0x50CE  # and the shuffle within a source of a mixture from that of the epoch

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


def sample_of_draw(draw: int, num_samples: int, seed: int, shares: Shares = ()) -> int:
    """Row number that draw `draw` shows."""
    epoch, place = divmod(draw, num_samples)
    return int(epoch_order(num_samples, seed, epoch, shares)[place])


@dataclass
class TrainingStream(Dataset[Example | EvsTrainError]):
    """All draws of a run, as a map-style data set.

    A sample that cannot be read comes out as its error, a value: the collator hands it to the process that trains,
    which stops with one clear line, where an exception would arrive as a worker's traceback.

    Attributes:
        num_draws: length of the run in draws (steps * global batch).
        verify: check each video from end to end before its first use.
        picture_draws: draws whose frames are kept in the example, for pictures of what is pruned.
        shares: see `weighted_rows`; empty without weights.
    """

    samples: Sequence[Sample]
    encoder: SampleEncoder
    sampling: FrameSampling
    num_draws: int
    seed: int
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_length: int | None = None
    verify: bool = True
    picture_draws: frozenset[int] = frozenset()
    shares: Shares = ()

    def __len__(self) -> int:
        return self.num_draws

    def __getitem__(self, draw: int) -> Example | EvsTrainError:
        try:
            return self.read(draw)
        except EvsTrainError as error:
            return error

    def read(self, draw: int) -> Example:
        """The example of one draw. Raises DataError or MediaError, naming the row."""
        sample = self.samples[sample_of_draw(draw, len(self.samples), self.seed, self.shares)]
        return build_example(
            sample,
            [read_video(path, self.sampling, verify=self.verify) for path in sample.videos],
            [read_image(path) for path in sample.images],
            self.encoder,
            draw=draw,
            template_kwargs=self.template_kwargs,
            max_length=self.max_length,
            keep_frames=draw in self.picture_draws,
        )
