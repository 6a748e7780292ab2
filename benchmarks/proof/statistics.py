"""Accuracies of the arms with intervals: all of them, and what is made of them, from the same draws of clips and seeds.

A draw takes as many clips as there are, with replacement, all questions of a clip together, and as many seeds; every
arm is given the same draws, so that differences and ratios of arms are paired. Three seeds say little of the spread
between seeds: intervals are mostly that of the clips.

Invariant: the same results give the same figures. Cost: a product of (seeds, clips) and (clips, draws) for each arm,
rate and group of questions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

NUM_DRAWS = 4000
LEVEL = 0.95

Floats = npt.NDArray[np.float64]
Right = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Figure:
    """A value with its draws.

    Attributes:
        value: from all clips and seeds.
        draws: (NUM_DRAWS,) the same from each draw.
    """

    value: float
    draws: Floats

    def __sub__(self, other: Figure) -> Figure:
        return Figure(self.value - other.value, self.draws - other.draws)

    def __truediv__(self, other: Figure) -> Figure:
        with np.errstate(divide="ignore", invalid="ignore"):
            draws = self.draws / other.draws
        return Figure(self.value / other.value if other.value else float("nan"), draws)

    def with_interval(self) -> dict[str, float]:
        """Value and the ends of its 95 % interval; NaN where a draw has none, as a ratio to nothing."""
        tail = 50.0 * (1.0 - LEVEL)
        low, high = np.percentile(self.draws, [tail, 100.0 - tail])
        return {"value": self.value, "low": float(low), "high": float(high)}


@dataclass
class Draws:
    """Draws of clips and seeds.

    Args:
        num_clips: held-out clips.
        num_seeds: most seeds that an arm has.
    """

    num_clips: int
    num_seeds: int
    clips: Floats = field(init=False)
    seeds: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        even = np.full(self.num_clips, 1.0 / self.num_clips)
        self.clips = rng.multinomial(self.num_clips, even, size=NUM_DRAWS).astype(np.float64)  # (draws, clips)
        self.seeds = rng.integers(self.num_seeds, size=(NUM_DRAWS, self.num_seeds))

    def mean(self, right: Right) -> Figure:
        """Accuracy of one arm at one rate.

        Args:
            right: (seeds, clips, questions) 1 where an answer is right; NaN for clips that are not looked at.
        """
        looked = ~np.isnan(right[0, :, 0])
        of_clip = np.where(looked, right.mean(axis=2), 0.0)  # (seeds, clips)
        counts = self.clips @ looked  # (draws,)
        of_seed = of_clip @ self.clips.T / np.maximum(counts, 1)  # (seeds, draws)
        picked = np.take_along_axis(of_seed, self.seeds.T % len(right), axis=0)  # (num_seeds, draws)
        return Figure(float(of_clip[:, looked].mean()), picked.mean(axis=0))
