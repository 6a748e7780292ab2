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
from evs_train.data.decoding import Decoding
from evs_train.data.manifest import Sample
from evs_train.data.sampling import FrameSampling
from evs_train.data.video import read_image, read_video
from evs_train.errors import EvsTrainError

_ORDER_STREAM = 0x0DE2  # keeps the shuffle's random stream apart from that of the rates


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Shuffled row numbers of one epoch, (num_samples,) int64."""
    return np.random.default_rng([seed, _ORDER_STREAM, epoch]).permutation(num_samples)


def sample_of_draw(draw: int, num_samples: int, seed: int) -> int:
    """Row number that draw `draw` shows."""
    epoch, place = divmod(draw, num_samples)
    return int(epoch_order(num_samples, seed, epoch)[place])


@dataclass
class TrainingStream(Dataset[Example | EvsTrainError]):
    """All draws of a run, as a map-style data set.

    A sample that cannot be read comes out as its error, a value: the collator hands it to the process that trains,
    which stops with one clear line, where an exception would arrive as a worker's traceback.

    Attributes:
        num_draws: length of the run in draws (steps * global batch).
        last_only: train on the last answer of each row alone.
        verify: check each video from end to end before its first use.
        decoding: decoder and limits.
        picture_draws: draws whose frames are kept in the example, for pictures of what is pruned.
    """

    samples: Sequence[Sample]
    encoder: SampleEncoder
    sampling: FrameSampling
    num_draws: int
    seed: int
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_length: int | None = None
    last_only: bool = False
    verify: bool = True
    decoding: Decoding = field(default_factory=Decoding)
    picture_draws: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return self.num_draws

    def __getitem__(self, draw: int) -> Example | EvsTrainError:
        try:
            return self.read(draw)
        except EvsTrainError as error:
            return error

    def read(self, draw: int) -> Example:
        """The example of one draw. Raises DataError or MediaError, naming the row."""
        sample = self.samples[sample_of_draw(draw, len(self.samples), self.seed)]
        return build_example(
            sample,
            [read_video(path, self.sampling, verify=self.verify, decoding=self.decoding) for path in sample.videos],
            [read_image(path, decoding=self.decoding) for path in sample.images],
            self.encoder,
            draw=draw,
            template_kwargs=self.template_kwargs,
            max_length=self.max_length,
            last_only=self.last_only,
            keep_frames=draw in self.picture_draws,
        )
