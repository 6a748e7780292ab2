"""Accuracy with its uncertainty when several questions are asked about one video, and tests between paired answers.

Questions about one video stand or fall together, so the video is the unit that is drawn: intervals come from a
bootstrap over videos, and a difference between two sets of answers to the same questions from the same draws (paired).
The test between two checkpoints flips the sign of each video's difference; it is exact, needs no seed, and is McNemar's
exact test where every video has one question.

Invariant: the same answers, seed and number of resamples give the same numbers, in whatever order the questions come.
Cost: `NUM_RESAMPLES` x videos draws, some tenths of a second for a thousand videos. Percentile intervals are a little
narrow with few videos (10 give 92 % in simulations like those of tests/evaluate/test_statistics.py). Nothing is
corrected for many comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NUM_RESAMPLES = 10_000
LEVEL = 0.95
_CHUNK = 1_000  # resamples in memory at a time

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """Two sets of answers to the same questions.

    Attributes:
        difference: accuracy of the second less that of the first.
        gained, lost: questions that only the second, or only the first, answers right.
        p_value: of the two-sided sign-flip test over videos.
    """

    difference: Estimate
    gained: int
    lost: int
    p_value: float


class ByVideo:
    """Questions grouped by video.

    Args:
        videos: what names the video of each question.
    """

    def __init__(self, videos: Sequence[str]) -> None:
        names, self._of = np.unique(np.asarray(videos, dtype=str), return_inverse=True)
        self.num_videos = len(names)
        self.counts = self.sums(np.ones(len(videos)))

    def sums(self, values: Floats) -> Floats:
        """(videos,) sum of `values` (questions,) over the questions of each video."""
        return np.bincount(self._of, weights=values, minlength=self.num_videos).astype(np.float64)


def means(columns: Sequence[Sequence[float]], videos: Sequence[str], lowest: float, seed: int = 0) -> list[Estimate]:
    """Mean of each column over the questions, with its interval, all from the same draws of videos.

    Where all values of a column are equal, or all are of one video, resampling shows no spread; the interval is then as
    wide as a change could be that so many videos need not have shown (`unseen`).

    Args:
        columns: values of each question, between `lowest` and 1.
        videos: of each question.
        lowest: 0 for answers, -1 for differences of answers.
        seed: of the resampling.
    """
    groups = ByVideo(videos)
    values = [np.asarray(column, np.float64) for column in columns]
    sums = np.stack([groups.sums(column) for column in values], axis=1)  # (videos, columns)
    rng = np.random.default_rng(seed)
    resampled = []
    for start in range(0, NUM_RESAMPLES, _CHUNK):
        drawn = _draws(rng, groups.num_videos, min(_CHUNK, NUM_RESAMPLES - start))
        resampled.append((drawn @ sums) / (drawn @ groups.counts)[:, None])
    tail = 100.0 * (1.0 - LEVEL) / 2
    lows, highs = np.percentile(np.concatenate(resampled), [tail, 100.0 - tail], axis=0)
    slack = unseen(groups.num_videos)
    return [
        Estimate(float(column.mean()), float(low), float(high))
        if np.ptp(column) and groups.num_videos > 1
        else Estimate(mean := float(column.mean()), max(lowest, mean - slack), min(1.0, mean + slack))
        for column, low, high in zip(values, lows, highs, strict=True)
    ]


def _draws(rng: np.random.Generator, num_videos: int, count: int) -> Floats:
    """(count, videos) how often each video is drawn when as many are drawn with replacement as there are."""
    chosen = rng.integers(num_videos, size=(count, num_videos)) + num_videos * np.arange(count)[:, None]
    return np.bincount(chosen.ravel(), minlength=count * num_videos).reshape(count, num_videos).astype(np.float64)


def accuracy(correct: Sequence[bool], videos: Sequence[str], seed: int = 0) -> Estimate:
    """Share of right answers, with its interval."""
    return means([correct], videos, 0.0, seed)[0]


def difference(before: Sequence[bool], after: Sequence[bool], videos: Sequence[str], seed: int = 0) -> Estimate:
    """Accuracy of `after` less that of `before` on the same questions, with the interval of the paired difference."""
    return means([[float(b) - float(a) for a, b in zip(before, after, strict=True)]], videos, -1.0, seed)[0]


def compare(first: Sequence[bool], second: Sequence[bool], videos: Sequence[str], seed: int = 0) -> Paired:
    """Two checkpoints on the same questions."""
    change = np.asarray(second, np.int64) - np.asarray(first, np.int64)
    sums = ByVideo(videos).sums(change.astype(np.float64))
    return Paired(
        difference=difference(first, second, videos, seed),
        gained=int((change > 0).sum()),
        lost=int((change < 0).sum()),
        p_value=sign_flip_test([int(one) for one in np.rint(sums)]),
    )


def sign_flip_test(differences: Sequence[int]) -> float:
    """Two-sided p-value of the sum of `differences` if each could as well have had the other sign.

    Args:
        differences: for each video, questions gained less questions lost. Zeros do not matter.

    Returns:
        The share of the 2^n equally likely sign patterns whose sum is at least as far from zero, exactly: the
        distribution of the sum is built up video by video. With differences of one question it is McNemar's exact test.
    """
    sizes = [abs(one) for one in differences if one]
    reach = sum(sizes)
    chances = np.zeros(2 * reach + 1)  # of the sums -reach ... reach
    chances[reach] = 1.0
    for size in sizes:
        up, down = np.zeros_like(chances), np.zeros_like(chances)
        up[size:], down[:-size] = chances[:-size], chances[size:]
        chances = (up + down) / 2
    seen = abs(sum(differences))
    far = np.abs(np.arange(-reach, reach + 1)) >= seen
    return min(1.0, float(chances[far].sum()))


def unseen(num_videos: int) -> float:
    """Largest probability of an event that can be missed in `num_videos` videos: with 97.5 % it would have been seen.

    About 3.7 / n; for the two ends of a 95 % interval.
    """
    return float(1.0 - ((1.0 - LEVEL) / 2) ** (1.0 / num_videos))


def within_tolerance(dense: float, change: Estimate, tolerance: float) -> str:
    """Whether an accuracy is within `tolerance` (relative) of the dense one.

    Args:
        dense: accuracy at rate 0.
        change: paired difference to it.
        tolerance: share of the dense accuracy that may be lost.

    Returns:
        "yes": the whole interval is above the limit. "no": the whole interval is below it. "open": the limit lies in
        the interval, so the questions are too few to tell.
    """
    limit = -tolerance * dense
    if change.low >= limit or math.isclose(change.low, limit, abs_tol=1e-12):
        return "yes"
    return "no" if change.high < limit else "open"


def shown_tolerance(dense: float, change: Estimate) -> float | None:
    """The smallest tolerance for which `within_tolerance` says yes; None where dense answers nothing right."""
    return max(0.0, -change.low) / dense if dense else None
