"""Which draws each micro-batch of a run reads: so many rows, or as many as fit into a budget of tokens after pruning.

A schedule is a pure function of (seed, rows' lengths, rates, processes): nothing depends on workers or on time. Its
micro-batches are numbered through: those of optimizer step 0, then of step 1; within a step first those that the ranks
compute at the same time. So rank r of W reads numbers r, r + W, r + 2W, ...

How batches with a budget are made is in `budget.py`.

Invariant: every draw is read exactly once. Cost: none to speak of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from evs_train.data.index import Fault
from evs_train.data.lengths import Length


@dataclass(frozen=True)
class Slot:
    """One draw of a micro-batch. Where batches have a budget, it is planned with the row of this `attempt`, which then
    has `num_tokens` tokens after pruning.
    """

    draw: int
    attempt: int = 0
    num_tokens: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """What is read together: the optimizer step and its draws."""

    step: int
    slots: tuple[Slot, ...]


class Schedule(Protocol):
    """What a run reads when."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        ...

    @property
    def per_step(self) -> int:
        """Micro-batches of an optimizer step, over all ranks."""
        ...

    def batch(self, number: int) -> MicroBatch:
        """Micro-batch `number` of `num_steps * per_step`."""
        ...

    def draws_before(self, step: int) -> int:
        """Draws that earlier steps read."""
        ...

    def describe(self) -> str:
        """What a step is, for people and for the run's record."""
        ...

    def way(self, slot: Slot, step: int, attempt: int, number: int) -> tuple[float, Length | None] | Fault:
        """How row `number` may be shown as this attempt: share of its frames and planned length; or why not."""
        ...


@dataclass(frozen=True)
class FixedBatches:
    """`batch_size` rows in each micro-batch, in the order of draws."""

    num_steps: int
    per_step: int
    batch_size: int

    def batch(self, number: int) -> MicroBatch:
        first = number * self.batch_size
        return MicroBatch(number // self.per_step, tuple(map(Slot, range(first, first + self.batch_size))))

    def draws_before(self, step: int) -> int:
        return step * self.per_step * self.batch_size

    def describe(self) -> str:
        return f"{self.per_step * self.batch_size} rows"

    def way(self, slot: Slot, step: int, attempt: int, number: int) -> tuple[float, Length | None] | Fault:
        return 1.0, None
