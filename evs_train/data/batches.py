"""Micro-batches of a run as a data set: what the loader's workers read.

A draw whose row cannot be read shows another one, which follows from (seed, draw) alone (`order.py`); the other draws
show what they would have shown. What was met is attached to the example (`quarantine.py`). Where batches have a budget,
a stand-in is no longer than what it stands for, and a row whose length is not the planned one is not shown.

Cost: media are read when their micro-batch is, in the loader's worker. This module does not pad or prune; see
`collate.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch.utils.data import Dataset

from evs_train.data.chat import Example
from evs_train.data.index import Fault
from evs_train.data.lengths import Length
from evs_train.data.order import DrawOrder
from evs_train.data.quarantine import BadSample, NoneLeftError
from evs_train.data.rows import RowReader
from evs_train.data.schedule import Schedule, Slot
from evs_train.errors import DataError, EvsTrainError, MediaError


@dataclass(frozen=True)
class Examples:
    """What was read for one micro-batch.

    An error stands here as a value: the collator hands it to the process that trains, which stops with one clear line,
    where an exception would arrive as a worker's traceback.
    """

    step: int
    rows: list[Example | EvsTrainError]


@dataclass
class TrainingStream(Dataset[Examples]):
    """All micro-batches of a run, over all ranks, as a map-style data set.

    Attributes:
        picture_draws: draws whose frames are kept in the example, for pictures of what is pruned.
        quarantine: show another sample in the place of a bad one; otherwise the first bad one is an error.
        max_bad_in_a_row: samples tried for one draw before it is an error.
    """

    reader: RowReader
    order: DrawOrder
    schedule: Schedule
    picture_draws: frozenset[int] = frozenset()
    quarantine: bool = True
    max_bad_in_a_row: int = 100

    def __len__(self) -> int:
        return self.schedule.num_steps * self.schedule.per_step

    def __getitem__(self, number: int) -> Examples:
        batch = self.schedule.batch(number)
        return Examples(batch.step, [self._try(slot, batch.step) for slot in batch.slots])

    def read(self, slot: Slot, step: int) -> Example:
        """The example of one draw.

        Raises:
            NoneLeftError: `max_bad_in_a_row` samples could not be read.
            DataError, MediaError: without quarantine, the draw's sample cannot be read; names the row.
        """
        bad: dict[int, BadSample] = {}
        for attempt in range(self.max_bad_in_a_row):
            number = self.order.row(slot.draw, attempt)
            if number in bad:
                continue
            try:
                example = self._read_row(number, slot, step, attempt)
            except (DataError, MediaError) as error:
                if not self.quarantine:
                    raise
                sample = self.reader.samples[number]
                file = self.reader.file_to_blame(sample, error)
                bad[number] = BadSample(
                    slot.draw, step, attempt, sample.id, sample.source, file, error.reason, error.message
                )
            else:
                return dataclasses.replace(example, draw=slot.draw, bad=tuple(bad.values()))
        raise NoneLeftError(tuple(bad.values()))

    def _try(self, slot: Slot, step: int) -> Example | EvsTrainError:
        try:
            return self.read(slot, step)
        except EvsTrainError as error:
            return error

    def _read_row(self, number: int, slot: Slot, step: int, attempt: int) -> Example:
        way = self.schedule.way(slot, step, attempt, number)
        if isinstance(way, Fault):
            raise DataError(*way)
        share, planned = way
        example = self.reader.read(number, share=share, keep_frames=slot.draw in self.picture_draws)
        if planned is not None and Length.of(example) != planned:
            raise DataError(
                f"{self.reader.samples[number].source}: has {len(example.input_ids)} tokens before pruning, where "
                f"{planned.num_tokens} were planned",
                "its media changed since the run began; start again to plan it anew",
                "changed",
            )
        return dataclasses.replace(example, share=share)
