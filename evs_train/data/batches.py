"""The order in which samples are drawn: a pure function of (seed, number of samples), whatever reads it.

A run is one stream of *draws* 0, 1, 2, ...: draw d belongs to optimizer step d // global_batch, and shows the sample
that epoch d // n of a seeded shuffle puts there. Ranks, workers, micro-batches and resumption only decide who reads a
draw, never what it is, so 1 and 8 processes train on the same rows in the same steps.

A draw whose sample cannot be read shows another one, which again follows from (seed, draw) alone; the other draws show
what they would have shown. What was met is attached to the example (`quarantine.py`).

Cost: one permutation of the row numbers per epoch; media are read when a draw is read, in the loader's worker.
This module does not batch or prune; see `collate.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from PIL.Image import Image
from torch.utils.data import Dataset

from evs_train.data.chat import Example, SampleEncoder, build_example
from evs_train.data.decoding import Decoding
from evs_train.data.index import Entry, Fault, MediaIndex
from evs_train.data.manifest import Sample
from evs_train.data.quarantine import BadSample, NoneLeftError
from evs_train.data.sampling import FrameSampling
from evs_train.data.sources import Source, TarMember, name_of
from evs_train.data.video import Clip, read_image, read_video
from evs_train.errors import DataError, EvsTrainError, MediaError

# These keep the random streams apart: shuffle, stand-ins, shuffle within a source of a mixture, rates.
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


def sample_of_draw(draw: int, num_samples: int, seed: int, shares: Shares = ()) -> int:
    """Row number that draw `draw` shows."""
    epoch, place = divmod(draw, num_samples)
    return int(epoch_order(num_samples, seed, epoch, shares)[place])


def stand_in_of_draw(draw: int, attempt: int, num_samples: int, seed: int, shares: Shares = ()) -> int:
    """Row number that `draw` tries as number `attempt` (1, 2, ...) when the ones before it cannot be read.

    It is the row of some draw of the same epoch, so that it comes from what the epoch is made of.
    """
    place = int(np.random.default_rng([seed, _STAND_IN_STREAM, draw, attempt]).integers(num_samples))
    return sample_of_draw(draw - draw % num_samples + place, num_samples, seed, shares)


@dataclass
class TrainingStream(Dataset[Example | EvsTrainError]):
    """All draws of a run, as a map-style data set.

    An error comes out as a value: the collator hands it to the process that trains, which stops with one clear line,
    where an exception would arrive as a worker's traceback.

    Attributes:
        num_draws: length of the run in draws (steps * global batch).
        last_only: train on the last answer of each row alone.
        verify: check each video from end to end before its first use, unless `index` knows the file.
        decoding: decoder and limits.
        picture_draws: draws whose frames are kept in the example, for pictures of what is pruned.
        quarantine: show another sample in the place of a bad one; otherwise the first bad one is an error.
        max_bad_in_a_row: samples tried for one draw before it is an error.
        index: what is known of media files that have not changed since.
        shares: see `weighted_rows`; empty without weights.
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
    shares: Shares = ()
    quarantine: bool = True
    max_bad_in_a_row: int = 100
    index: MediaIndex = field(default_factory=MediaIndex)
    # What this process found to be bad, so that it is not decoded again. Whole errors would keep their frames alive.
    _bad_files: dict[Source, Fault] = field(default_factory=dict)
    _bad_rows: dict[int, Fault] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.num_draws

    def __getitem__(self, draw: int) -> Example | EvsTrainError:
        try:
            return self.read(draw)
        except EvsTrainError as error:
            return error

    def read(self, draw: int) -> Example:
        """The example of one draw.

        Raises:
            NoneLeftError: `max_bad_in_a_row` samples could not be read.
            DataError, MediaError: without quarantine, the draw's sample cannot be read; names the row.
        """
        number = sample_of_draw(draw, len(self.samples), self.seed, self.shares)
        if not self.quarantine:
            return self._read_sample(number, draw)
        bad: dict[int, BadSample] = {}
        for attempt in range(self.max_bad_in_a_row):
            if attempt:
                number = stand_in_of_draw(draw, attempt, len(self.samples), self.seed, self.shares)
            if number in bad:
                continue
            try:
                example = self._read_sample(number, draw)
            except (DataError, MediaError) as error:
                sample = self.samples[number]
                media = (*sample.videos, *sample.images)
                files = [name_of(one) for one in media if one in self._bad_files]
                file = files[0] if files and isinstance(error, MediaError) else None
                bad[number] = BadSample(draw, attempt, sample.id, sample.source, file, error.reason, error.message)
            else:
                return dataclasses.replace(example, bad=tuple(bad.values())) if bad else example
        raise NoneLeftError(tuple(bad.values()))

    def _read_sample(self, number: int, draw: int) -> Example:
        if number in self._bad_rows:
            raise DataError(*self._bad_rows[number])
        sample = self.samples[number]
        clips = [self._clip(source) for source in sample.videos]
        images = [self._image(source) for source in sample.images]
        try:
            return build_example(
                sample,
                clips,
                images,
                self.encoder,
                draw=draw,
                template_kwargs=self.template_kwargs,
                max_length=self.max_length,
                last_only=self.last_only,
                keep_frames=draw in self.picture_draws,
            )
        except DataError as error:
            self._bad_rows[number] = Fault(error.message, error.hint, error.reason)
            raise

    def _clip(self, source: Source) -> Clip:
        known = self._known(source)
        verify, suits_decord = self.verify and known is None, known is not None and known.backend == "decord"
        with self._remembered(source):
            return read_video(source, self.sampling, verify=verify, suits_decord=suits_decord, decoding=self.decoding)

    def _image(self, source: str | TarMember) -> Image:
        self._known(source)
        with self._remembered(source):
            return read_image(source, decoding=self.decoding)

    def _known(self, source: Source) -> Entry | None:
        """What the index knows of a good file, as it is now. Raises MediaError if it is known to be bad."""
        fault = self._bad_files.get(source)
        if fault is None:
            entry = self.index.find(source)
            if entry is None or entry.fault is None:
                return entry
            fault = self._bad_files[source] = entry.fault
        raise MediaError(*fault)

    @contextlib.contextmanager
    def _remembered(self, source: Source) -> Iterator[None]:
        try:
            yield
        except MediaError as error:
            self._bad_files[source] = Fault(error.message, error.hint, error.reason)
            raise
