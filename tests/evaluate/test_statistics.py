"""Intervals and tests against known answers, and the coverage of the intervals on simulated clustered answers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from evs_train.evaluate import statistics
from evs_train.evaluate.statistics import (
    Estimate,
    accuracy,
    compare,
    difference,
    means,
    shown_tolerance,
    sign_flip_test,
    unseen,
    within_tolerance,
)


def simulated(rng: np.random.Generator, num_videos: int, per_video: int) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Answers whose chance of being right is the video's own (uniform, mean 0.5); also those chances."""
    chances = rng.uniform(size=num_videos)
    right = rng.uniform(size=(num_videos, per_video)) < chances[:, None]
    return right.ravel(), [str(v) for v in range(num_videos) for _ in range(per_video)], chances


def coverage(monkeypatch: pytest.MonkeyPatch, num_videos: int, clustered: bool) -> float:
    monkeypatch.setattr(statistics, "NUM_RESAMPLES", 400)
    rng, hits, rounds = np.random.default_rng(0), 0, 600 if clustered else 200
    for _ in range(rounds):
        right, videos, _ = simulated(rng, num_videos, per_video=4)
        found = accuracy(list(right), videos if clustered else [str(i) for i in range(len(videos))])
        hits += found.low <= 0.5 <= found.high
    return hits / rounds


def test_intervals_cover_the_truth_where_questions_share_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    """600 simulations: the share of hits has a standard error of 0.9 points."""
    assert 0.92 <= coverage(monkeypatch, num_videos=60, clustered=True) <= 0.975


def test_questions_taken_as_independent_would_cover_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    assert coverage(monkeypatch, num_videos=60, clustered=False) < 0.89


def test_the_paired_interval_covers_the_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the right answers is lost: a change of -0.05."""
    monkeypatch.setattr(statistics, "NUM_RESAMPLES", 400)
    rng, hits, rounds = np.random.default_rng(1), 0, 600
    for _ in range(rounds):
        right, videos, _ = simulated(rng, 60, per_video=4)
        kept = right & (rng.uniform(size=len(right)) < 0.9)
        found = difference(list(right), list(kept), videos)
        hits += found.low <= -0.05 <= found.high
    assert 0.915 <= hits / rounds <= 0.975


def test_a_paired_interval_is_narrower_than_the_two_apart() -> None:
    rng = np.random.default_rng(2)
    right, videos, _ = simulated(rng, 80, per_video=3)
    kept = right & (rng.uniform(size=len(right)) < 0.95)
    paired, alone = difference(list(right), list(kept), videos), accuracy(list(right), videos)
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low)
    assert math.isclose(paired.value, kept.mean() - right.mean())


def test_one_question_a_video_gives_the_binomial_interval() -> None:
    """70 of 100: the normal interval of a proportion is 0.7 +- 0.0898."""
    found = accuracy([True] * 70 + [False] * 30, [str(i) for i in range(100)])
    assert found.value == 0.7
    assert abs(found.low - 0.61) < 0.015
    assert abs(found.high - 0.79) < 0.015


def test_one_video_more_often_asked_about_weighs_more() -> None:
    found = accuracy([True] * 9 + [False], ["a"] * 9 + ["b"])
    assert found.value == 0.9
    assert (found.low, found.high) == (0.0, 1.0)  # both, or one of them twice: nothing else can be drawn


def test_one_video_shows_no_spread_and_so_nothing() -> None:
    found = accuracy([True, False, True, True], ["a"] * 4)
    assert (found.value, found.low, found.high) == (0.75, 0.0, 1.0)


def test_the_order_of_questions_does_not_matter_and_the_seed_does() -> None:
    rng = np.random.default_rng(3)
    right, videos, _ = simulated(rng, 30, per_video=2)
    order = rng.permutation(len(videos))
    shuffled = accuracy(list(right[order]), [videos[i] for i in order])
    first = accuracy(list(right), videos)
    assert shuffled == first
    column = list(rng.uniform(size=len(videos)))
    assert means([column], videos, 0.0, seed=1) != means([column], videos, 0.0) == means([column], videos, 0.0)


def test_columns_of_one_call_are_those_of_single_calls() -> None:
    right, videos, _ = simulated(np.random.default_rng(4), 30, per_video=2)
    both = means([list(right), list(~right)], videos, 0.0)
    assert both == [accuracy(list(right), videos), accuracy(list(~right), videos)]


@pytest.mark.parametrize("all_right", [True, False])
def test_answers_without_spread_have_the_exact_binomial_interval(all_right: bool) -> None:
    """Clopper and Pearson for 0 of 20: the upper end is 0.1684."""
    found = accuracy([all_right] * 40, [str(i // 2) for i in range(40)])
    width = found.high - found.low
    assert found.value == float(all_right)
    assert width == pytest.approx(0.1684, abs=1e-4)
    assert (found.high if all_right else found.low) == float(all_right)
    assert unseen(1000) == pytest.approx(3.69 / 1000, rel=0.01)


def test_a_difference_that_was_never_seen_is_not_known_to_be_none() -> None:
    found = difference([True, False] * 20, [True, False] * 20, [str(i // 2) for i in range(40)])
    assert found == Estimate(0.0, pytest.approx(-0.1684, abs=1e-4), pytest.approx(0.1684, abs=1e-4))


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    # exact McNemar: twice the lower tail of a binomial with a half
    [(10, 2, 0.03857421875), (5, 5, 1.0), (6, 0, 0.03125), (1, 0, 1.0), (0, 0, 1.0), (9, 1, 0.021484375)],
)
def test_with_one_question_a_video_the_test_is_mcnemar_s(gained: int, lost: int, p_value: float) -> None:
    first = [False] * gained + [True] * lost + [True] * 7
    second = [True] * gained + [False] * lost + [True] * 7
    found = compare(first, second, [str(i) for i in range(len(first))])
    assert (found.gained, found.lost) == (gained, lost)
    assert found.p_value == pytest.approx(p_value)


def test_the_sign_flip_test_counts_all_patterns() -> None:
    values = [3, -1, 2, 2, 0, -4, 1]
    patterns = [sum(sign * v for sign, v in zip(signs, values, strict=True)) for signs in _signs(len(values))]
    expected = np.mean([abs(total) >= abs(sum(values)) for total in patterns])
    assert sign_flip_test(values) == pytest.approx(float(expected))


def _signs(count: int) -> list[tuple[int, ...]]:
    return list(itertools.product((-1, 1), repeat=count))


def test_the_test_rejects_as_often_as_it_says_and_mcnemar_would_reject_too_often() -> None:
    """No true difference, four questions a video that change together: at most 5 % may be called different."""
    rng = np.random.default_rng(5)
    clustered, alone, rounds = 0, 0, 400
    for _ in range(rounds):
        change = np.repeat(rng.choice([-1, 0, 1], size=40, p=[0.2, 0.6, 0.2]), 4)
        sums = change.reshape(40, 4).sum(1)
        clustered += sign_flip_test([int(s) for s in sums]) < 0.05
        alone += sign_flip_test([int(c) for c in change]) < 0.05
    assert clustered / rounds <= 0.075  # 5 % and two and a half standard errors
    assert alone / rounds > 0.2


def test_a_thousand_videos_are_tested_at_once() -> None:
    assert sign_flip_test([1] * 40 + [-1] * 10 + [2] * 5 + [-3] * 2 + [0] * 900) < 0.01


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (Estimate(-0.002, -0.007, 0.003), "yes"),
        (Estimate(-0.002, -0.008, 0.003), "yes"),  # the limit itself: 1 % of 0.8
        (Estimate(-0.002, -0.02, 0.01), "open"),
        (Estimate(-0.03, -0.05, -0.01), "no"),
        (Estimate(0.05, 0.01, 0.09), "yes"),
    ],
)
def test_within_tolerance_is_judged_by_the_whole_interval(change: Estimate, verdict: str) -> None:
    assert within_tolerance(0.8, change, 0.01) == verdict
    shown = shown_tolerance(0.8, change)
    assert shown is not None
    assert within_tolerance(0.8, change, shown) == "yes"
    assert shown == 0 or within_tolerance(0.8, change, shown * 0.99) != "yes"


def test_nothing_is_within_tolerance_of_a_model_that_answers_nothing() -> None:
    assert shown_tolerance(0.0, Estimate(0.0, -0.1, 0.1)) is None
