"""Micro-batches of as many rows as fit into a budget of tokens after pruning.

Each step has a rate and thus every waiting draw a length. A micro-batch is begun by the draw that has waited longest,
so none waits for ever. Rows that will be packed are joined by the next draws that still fit; rows that will be padded,
by those nearest in length. Micro-batches of one step are handed to the ranks by size, so that those computed at the
same time are alike.

Invariant: no micro-batch has more tokens than the budget, padding included. A row that alone has more is shown with
fewer frames (`lengths.PlannedRow.levels`), or not at all; nothing is cut. The plan is a pure function of the rows'
lengths, the order of draws, the rates and the number of processes. Cost: about 0.1 ms for each draw, at the start, in
every process (benchmarks/batches.py); 20 bytes for each draw, and the lengths of all rows.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from evs_train.data.index import Fault
from evs_train.data.lengths import Length, PlannedRow, Refused, share_of
from evs_train.data.order import DrawOrder
from evs_train.data.schedule import MicroBatch, Slot
from evs_train.errors import DataError
from evs_train.pruners.base import Pruner
from evs_train.pruners.evs import EVS
from evs_train.rates import Rates

LOOKAHEAD = 16
"""Micro-batches' worth of tokens that wait beside those of the step, to be chosen from."""


@dataclass(frozen=True)
class Budget:
    """What a micro-batch may hold.

    Attributes:
        tokens: after pruning, padding included.
        media_tokens: before pruning, which is what the vision encoder makes; None: no limit. One row may have more.
        packing: rows are joined instead of padded.
        lose_frames: show a row that alone is too long with fewer frames, instead of refusing it.
    """

    tokens: int
    media_tokens: int | None = None
    packing: bool = False
    lose_frames: bool = True


@dataclass(frozen=True)
class _Shown:
    """A draw as it would be shown in some step: `num_tokens` are left of `length`."""

    draw: int
    attempt: int
    level: int
    length: Length
    num_tokens: int


@dataclass(frozen=True)
class Usage:
    """How a run uses its micro-batches.

    Attributes:
        fill: tokens as a share of the budget.
        padding: share of the computed tokens that is padding.
        imbalance: by how much the largest of the micro-batches computed at the same time is above their mean.
        shortened: draws that are shown with fewer frames.
        replaced: draws that show another row, because theirs is refused or too long.
        most_supervised: the most tokens of a micro-batch that are trained on.
        most_video_tokens, most_image_tokens: the most that a micro-batch has, before pruning.
    """

    fill: float
    padding: float
    imbalance: float
    shortened: int
    replaced: int
    most_supervised: int
    most_video_tokens: int
    most_image_tokens: int


class BudgetBatches:
    """Micro-batches that keep a budget."""

    def __init__(
        self,
        rows: Sequence[PlannedRow | Refused],
        order: DrawOrder,
        rates: Rates,
        budget: Budget,
        *,
        per_step: int,
        at_once: int,
        num_steps: int | None = None,
        num_draws: int = 0,
        max_attempts: int = 100,
        pruner: Pruner = EVS,
    ) -> None:
        """Plan the run.

        Args:
            rows: all rows, in order.
            per_step: micro-batches of a step, over all ranks.
            at_once: ranks; each computes one micro-batch at the same time.
            num_steps: length of the run; None: until `num_draws` draws are read.
            max_attempts: rows tried for one draw.
            pruner: says how many tokens stay.

        Raises:
            DataError: no row that is tried for some draw fits into the budget.
        """
        self.rows, self.order, self.rates, self.budget = rows, order, rates, budget
        self.per_step, self.at_once, self.max_attempts, self.pruner = per_step, at_once, max_attempts, pruner
        self._draws, self._attempts, self._lengths = array("q"), array("i"), array("q")
        self._starts = array("q", [0])  # of each micro-batch in these
        self._num_shortened = self._most_supervised = self._most_video_tokens = self._most_image_tokens = 0
        self._rate = lru_cache(maxsize=1 << 16)(rates.of_video)
        self.num_steps = self._plan(num_steps, num_draws)
        self._rate.cache_clear()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_rate"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._rate = lru_cache(maxsize=1 << 16)(self.rates.of_video)

    def batch(self, number: int) -> MicroBatch:
        part = slice(self._starts[number], self._starts[number + 1])
        slots = map(Slot, self._draws[part], self._attempts[part], self._lengths[part])
        return MicroBatch(number // self.per_step, tuple(slots))

    def draws_before(self, step: int) -> int:
        return self._starts[step * self.per_step]

    def describe(self) -> str:
        joined = "packed" if self.budget.packing else "padded"
        plan = hashlib.sha256()
        for step in range(self.num_steps):  # whichever rank reads what
            part = slice(self.draws_before(step), self.draws_before(step + 1))
            slots = zip(self._draws[part], self._attempts[part], self._lengths[part], strict=True)
            plan.update(repr(sorted(slots)).encode())
        return f"{self.per_step} {joined} micro-batches of {self.budget.tokens} tokens (plan {plan.hexdigest()[:12]})"

    def way(self, slot: Slot, step: int, attempt: int, number: int) -> tuple[float, Length | None] | Fault:
        most = self.budget.tokens if attempt <= slot.attempt else slot.num_tokens
        shown = self._fit(number, slot.draw, step, most)
        return shown if isinstance(shown, Fault) else (share_of(shown[0]), shown[1])

    def usage(self) -> Usage:
        """Sums over the whole run."""
        tokens, sizes = 0, []
        for first, end in itertools.pairwise(self._starts):
            lengths = self._lengths[first:end]
            tokens += sum(lengths)
            sizes.append(self._size(lengths))
        groups = [sizes[first : first + self.at_once] for first in range(0, len(sizes), self.at_once)]
        excess = sum(max(group) * len(group) / sum(group) - 1 for group in groups)
        return Usage(
            fill=tokens / (len(sizes) * self.budget.tokens),
            padding=1 - tokens / sum(sizes),
            imbalance=excess / len(groups),
            shortened=self._num_shortened,
            replaced=sum(attempt > 0 for attempt in self._attempts),
            most_supervised=self._most_supervised,
            most_video_tokens=self._most_video_tokens,
            most_image_tokens=self._most_image_tokens,
        )

    def _plan(self, num_steps: int | None, num_draws: int) -> int:
        """Fill all micro-batches; the number of steps."""
        waiting: list[_Shown] = []
        next_draw = step = 0
        while True:
            ends = num_steps is None and next_draw >= num_draws
            if step == num_steps or (ends and all(one.draw >= num_draws for one in waiting)):
                return step
            if not self.rates.per_sample:
                self._rate.cache_clear()
            waiting = [self._shown(one.draw, step) for one in waiting]
            tokens = sum(one.num_tokens for one in waiting)
            while tokens < self.budget.tokens * (self.per_step + (0 if ends else LOOKAHEAD)):
                waiting.append(self._shown(next_draw, step))
                tokens += waiting[-1].num_tokens
                next_draw += 1
            taken: set[int] = set()
            batches = [self._fill(waiting, taken) for _ in range(self.per_step)]
            batches.sort(key=lambda batch: -self._size([one.num_tokens for one in batch]))
            for first in range(0, self.per_step, self.at_once):
                group = batches[first : first + self.at_once]
                for batch in reversed(group) if first // self.at_once % 2 else group:  # no rank has all the largest
                    self._append(batch)
            waiting = [one for one in waiting if one.draw not in taken]
            step += 1

    def _fill(self, waiting: Sequence[_Shown], taken: set[int]) -> list[_Shown]:
        """The next micro-batch; its draws are `taken`."""
        within = self.budget.tokens * LOOKAHEAD
        candidates: list[_Shown] = []
        for one in waiting:
            if one.draw not in taken:
                candidates.append(one)
                within -= one.num_tokens
                if within < 0:
                    break
        first, *others = candidates
        if not self.budget.packing:
            others.sort(key=lambda one: (abs(one.num_tokens - first.num_tokens), one.draw))
        most_media = self.budget.media_tokens
        batch, total, longest = [first], first.num_tokens, first.num_tokens
        for one in others:
            size = total + one.num_tokens if self.budget.packing else (len(batch) + 1) * max(longest, one.num_tokens)
            fits = size <= self.budget.tokens
            if fits and most_media is not None:
                fits = sum(of.length.num_media_tokens for of in (*batch, one)) <= most_media
            if fits:
                batch.append(one)
                total, longest = total + one.num_tokens, max(longest, one.num_tokens)
            elif not self.budget.packing:
                break  # the next ones are less alike still
        taken.update(one.draw for one in batch)
        return batch

    def _append(self, batch: Sequence[_Shown]) -> None:
        for one in sorted(batch, key=lambda one: one.draw):
            self._draws.append(one.draw)
            self._attempts.append(one.attempt)
            self._num_shortened += one.level > 0
            self._lengths.append(one.num_tokens)
        self._starts.append(len(self._draws))
        lengths = [one.length for one in batch]
        self._most_supervised = max(self._most_supervised, sum(one.num_supervised for one in lengths))
        self._most_video_tokens = max(self._most_video_tokens, sum(one.num_video_tokens for one in lengths))
        self._most_image_tokens = max(self._most_image_tokens, sum(one.num_image_tokens for one in lengths))

    def _size(self, lengths: Sequence[int]) -> int:
        """Tokens of the tensors that rows of these lengths make."""
        return sum(lengths) if self.budget.packing else len(lengths) * max(lengths)

    def _shown(self, draw: int, step: int) -> _Shown:
        last = ""
        for attempt in range(self.max_attempts):
            found = self._fit(self.order.row(draw, attempt), draw, step, self.budget.tokens)
            if not isinstance(found, Fault):
                return _Shown(draw, attempt, *found)
            last = found.message
        raise DataError(
            f"data.max_tokens_per_batch = {self.budget.tokens}: {self.max_attempts} rows tried for draw {draw} are all "
            f"refused or too long; the last one: {last}",
            "raise it, or see evs-train check",
        )

    def _fit(self, number: int, draw: int, step: int, most: int) -> tuple[int, Length, int] | Fault:
        """Level, length and retained tokens of a row within `most` tokens."""
        row = self.rows[number]
        if isinstance(row, Refused):
            return Fault(row.message, row.hint, row.reason)
        num_tokens, index = 0, draw if self.rates.per_sample else 0  # one rate for all rows of a step is drawn once
        for level, length in enumerate(row.levels if self.budget.lose_frames else row.levels[:1]):
            num_tokens = length.retained_tokens(lambda units: self._rate(index, step, units), self.pruner)
            if num_tokens <= most:
                return level, length, num_tokens
        return Fault(
            f"{row.row}: {num_tokens} tokens after pruning, above data.max_tokens_per_batch = {self.budget.tokens}",
            "raise it, or sample fewer frames",
            "too long",
        )
