"""Which pruning rate each draw gets: the recipe's sampler with its scope and its cap.

Invariant: a pure function of (seed, draw, step, temporal units), so the plan of a run knows its rates before anything
is read. Cost: that of `samplers.py`. This module does not count tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from evs_train.samplers import RateSampler, cap_rate


@dataclass(frozen=True)
class Rates:
    """Rates of rows and of their videos.

    Attributes:
        sampler: draws the rates.
        seed: of the recipe.
        per_sample: one rate per draw instead of one per optimizer step.
        cap: keep each video's rate low enough that more than its first unit is left.
    """

    sampler: RateSampler
    seed: int = 0
    per_sample: bool = False
    cap: bool = True

    def of_row(self, draw: int, step: int) -> float:
        """The rate of a row, before any cap."""
        return self.sampler.rate(self.seed, draw if self.per_sample else step, step=step, num_units=None)

    def of_video(self, draw: int, step: int, num_units: int) -> float:
        """The rate of one of its videos, of `num_units` temporal units."""
        rate = self.sampler.rate(self.seed, draw if self.per_sample else step, step=step, num_units=num_units)
        return cap_rate(rate, num_units) if self.cap else rate
