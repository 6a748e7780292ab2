"""VidCom2 against a slow reference that goes from token to token, written from the description of the engine's rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from evs_train.pruners import build_pruner
from evs_train.pruners.base import Video
from evs_train.pruners.vidcom2 import budgets, ranks
from tests.pruners.test_pruners import drifting

DTYPES = [torch.float32, torch.bfloat16]


def to_float32(value: float) -> float:
    return float(np.float32(value))


def to_bfloat16(value: float) -> float:
    """To the nearest of the float32 numbers whose lower half is empty, halves to the even one."""
    bits = int(np.float32(value).view(np.uint32))
    return float(np.uint32((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32))


ROUNDED: dict[torch.dtype, Callable[[float], float]] = {torch.float32: to_float32, torch.bfloat16: to_bfloat16}


class Slow:
    """The rule in plain Python. Every number is rounded to `dtype` where a tensor of it would be."""

    def __init__(self, embeds: Tensor) -> None:
        self.rounded = ROUNDED[embeds.dtype]
        frames: list[list[list[float]]] = embeds.double().tolist()
        self.num_frames, self.per_frame = len(frames), len(frames[0])
        tokens = [token for frame in frames for token in frame]
        variances = []
        for channel in range(len(tokens[0])):
            values = [token[channel] for token in tokens]
            mean = sum(values) / len(values)
            variances.append(self.rounded(sum((value - mean) ** 2 for value in values) / len(values)))
        order = sorted(range(len(variances)), key=lambda channel: (variances[channel], channel))
        calm = order[: max(1, int(len(variances) * 0.5))]
        normalised = [self.normalised([token[channel] for channel in calm]) for token in tokens]
        centre = self.mean(normalised)
        self.to_video, self.scores = [], []
        for frame in range(self.num_frames):
            of_frame = normalised[frame * self.per_frame : (frame + 1) * self.per_frame]
            own_centre = self.mean(of_frame)
            for token in of_frame:
                self.to_video.append(self.kernels(token, centre))
                self.scores.append(self.rounded(self.to_video[-1] + self.kernels(token, own_centre)))

    def normalised(self, token: Sequence[float]) -> list[float]:
        norm = max(self.rounded(math.sqrt(sum(value * value for value in token))), 1e-12)
        return [self.rounded(value / norm) for value in token]

    def mean(self, tokens: Sequence[Sequence[float]]) -> list[float]:
        return [self.rounded(sum(values) / len(tokens)) for values in zip(*tokens, strict=True)]

    def kernels(self, token: Sequence[float], centre: Sequence[float]) -> float:
        squares = [self.rounded(self.rounded(a - b) ** 2) for a, b in zip(token, centre, strict=True)]
        distance, total = self.rounded(sum(squares)), 0.0
        for variance in (1 / 8, 1 / 4, 1 / 2, 1, 2):
            total = self.rounded(total + self.rounded(math.exp(self.rounded(-distance / (2 * variance)))))
        return total

    def budgets(self, retention: float) -> list[int]:
        r, per_frame = self.rounded, self.per_frame
        u = [r(-sum(self.to_video[t * per_frame : (t + 1) * per_frame]) / per_frame) for t in range(self.num_frames)]
        powers = [math.exp(r(r(one - max(u)) / 0.01)) for one in u]
        shares = [r(power / sum(powers)) for power in powers]
        mean = r(sum(shares) / len(shares))
        kept = [min(1.0, r(retention * r(r(1 + share) - mean))) for share in shares]
        return [min(per_frame, max(1, round(r(one * per_frame)))) for one in kept]  # Python's round is half-even

    def kept(self, rate: float) -> tuple[list[int], int]:
        """The places kept, and what the budgets had above the exact total before it was brought about."""
        budgets, per_frame = self.budgets(1.0 - rate), self.per_frame
        kept: set[int] = set()
        for frame, budget in enumerate(budgets):
            places = range(frame * per_frame, (frame + 1) * per_frame)
            kept |= set(sorted(places, key=lambda place: (self.scores[place], place))[:budget])
        num_tokens = self.num_frames * per_frame
        total = max(self.num_frames, min(int(num_tokens * (1.0 - rate)), num_tokens))
        surplus = len(kept) - total
        while len(kept) > total:  # the highest goes, of equal ones the later
            kept.remove(max(kept, key=lambda place: (self.scores[place], place)))
        while len(kept) < total:
            kept.add(min(set(range(num_tokens)) - kept, key=lambda place: (self.scores[place], place)))
        return sorted(kept), surplus


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_frames", "per_frame", "channels"),
    [(1, 9, 24), (2, 4, 24), (8, 16, 24), (7, 5, 24), (6, 1, 24), (8, 16, 1), (5, 6, 2), (1, 1, 3)],
)
def test_the_slow_reference_keeps_the_same(num_frames: int, per_frame: int, channels: int, dtype: torch.dtype) -> None:
    for seed in range(2):
        embeds = drifting(num_frames, per_frame, dtype, seed)[..., :channels]
        slow = Slow(embeds)
        for rate in (0.0, 0.1, 0.25, 0.5, 0.75, 0.8, 0.9, 0.99):
            found = build_pruner("vidcom2").choose(Video(embeds), rate).index
            assert found.tolist() == slow.kept(rate)[0], (seed, rate)


@pytest.mark.parametrize("dtype", DTYPES)
def test_budgets_that_add_up_to_more_and_to_less_are_brought_to_the_total(dtype: torch.dtype) -> None:
    surpluses = {}
    for rate in (0.05, 0.65, 0.75):
        for seed in range(4):
            embeds = drifting(8, 5, dtype, seed)
            expected, surplus = Slow(embeds).kept(rate)
            surpluses[seed, rate] = surplus
            assert build_pruner("vidcom2").choose(Video(embeds), rate).index.tolist() == expected
    assert min(surpluses.values()) < 0 < max(surpluses.values()), surpluses


def test_a_frame_may_lose_its_last_token() -> None:
    """The floor of a token for each frame holds for the budgets and the total, not for what is kept in the end."""
    for seed in range(20):
        embeds = drifting(8, 5, seed=seed)
        chosen = build_pruner("vidcom2").choose(Video(embeds), 0.8).index
        assert len(chosen) == 8
        if len(set((chosen // 5).tolist())) < 8:
            return
    raise AssertionError("no frame ever lost all of its tokens")


def test_the_frame_unlike_the_others_gets_more() -> None:
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, 16, 24, generator=generator) + 0.01 * torch.randn(8, 16, 24, generator=generator)
    embeds[5] = -embeds[5]
    chosen = build_pruner("vidcom2").choose(Video(embeds), 0.75).index
    of_frames = torch.bincount(chosen // 16, minlength=8)
    assert int(of_frames.argmax()) == 5
    assert int(of_frames[5]) >= 7  # R * (2 - 1 / T) * N = 7.5, where all others have R * (1 - 1 / T) * N = 3.5
    assert int(of_frames.sum()) == 32


def test_counts_are_the_engines() -> None:
    count = build_pruner("vidcom2").num_retained
    assert count(10, 1, 0.9) == 10  # int(10 * (1 - 0.9)) is 0 in doubles
    assert count(100, 100, 0.9) == 999
    assert count(4, 256, 0.7) == 307
    assert count(64, 4, 0.99) == 64  # where EVS keeps a unit
    assert count(3, 7, 0.0) == 21
    with pytest.raises(ValueError, match=r"pruning_rate must be in \[0, 1\)"):
        count(3, 7, 1.0)


def test_halves_are_rounded_to_the_even_number() -> None:
    alike = torch.zeros(2, 5)
    assert budgets(alike, 0.5).tolist() == [2, 2]  # 2.5
    assert budgets(torch.zeros(2, 7), 0.5).tolist() == [4, 4]  # 3.5
    assert budgets(alike, 0.01).tolist() == [1, 1]
    assert budgets(alike, 1.0).tolist() == [5, 5]


def test_equal_scores_go_to_the_earlier() -> None:
    assert ranks(torch.tensor([[2.0, 1.0, 1.0, 2.0]])).tolist() == [[2, 0, 1, 3]]
    still = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0)).expand(4, 6, 8)
    chosen = build_pruner("vidcom2").choose(Video(still), 0.5).index
    assert chosen.tolist() == [unit * 6 + place for unit in range(4) for place in range(3)]
