"""NVIDIA's rules against torch.quantile, which the published code takes, and against slow sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from evs_train.errors import RecipeError
from evs_train.pruners import Method, build_pruner
from evs_train.pruners.base import Video
from evs_train.pruners.nvidia import above_quantile
from tests.pruners.test_pruners import drifting, video_of

RATES = (0.01, 0.3, 0.5, 0.7, 0.75, 0.85)


def changes_of(embeds: Tensor, metric: str = "l1") -> Tensor:
    """(T - 1, N) float32, token by token."""
    rows = []
    for unit in range(1, len(embeds)):
        now, before = embeds[unit].float(), embeds[unit - 1].float()
        if metric == "l1":
            rows.append(torch.stack([(a - b).abs().mean() for a, b in zip(now, before, strict=True)]))
        else:
            rows.append(torch.stack([1 - F.cosine_similarity(a, b, dim=0) for a, b in zip(now, before, strict=True)]))
    return torch.stack(rows)


def noise(num_units: int, per_unit: int, seed: int = 0) -> Tensor:
    """Embeddings of which no two change alike."""
    return torch.randn(num_units, per_unit, 24, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("metric", ["l1", "cos"])
@pytest.mark.parametrize(("num_units", "per_unit"), [(8, 16), (20, 4), (7, 5)])
def test_pairwise_keeps_what_lies_above_the_quantile(num_units: int, per_unit: int, metric: str) -> None:
    embeds = noise(num_units, per_unit)
    scores = torch.cat([torch.full((per_unit,), 255.0), changes_of(embeds, metric).flatten()])
    for rate in RATES:
        expected = torch.nonzero(scores > torch.quantile(scores, rate))[:, 0]
        found = build_pruner({"kind": "nvidia", "metric": metric}).choose(Video(embeds), rate).index
        assert torch.equal(found, expected), rate


def test_pairwise_between_pixels_looks_at_nothing_else() -> None:
    pruner = build_pruner({"kind": "nvidia", "level": "pixels"})
    assert pruner.needs_changes
    assert not build_pruner("nvidia").needs_changes
    embeds, change = torch.zeros(8, 16, 24), torch.rand(8, 16, generator=torch.Generator().manual_seed(0))
    scores = torch.cat([torch.full((16,), 255.0), change[1:].flatten()])
    found = pruner.choose(Video(embeds, change=change), 0.75).index
    assert torch.equal(found, torch.nonzero(scores > torch.quantile(scores, 0.75))[:, 0])


def test_scores_are_those_of_float32() -> None:
    embeds = drifting(8, 16, torch.bfloat16)
    for metric in ("l1", "cos"):
        pruner = build_pruner({"kind": "nvidia", "metric": metric})
        for rate in RATES:
            exact = pruner.choose(Video(embeds.float()), rate).index
            assert torch.equal(pruner.choose(Video(embeds), rate).index, exact)


def test_where_the_published_code_keeps_nothing() -> None:
    """Equal changes: all are dropped there. Above 1 - 1/T the quantile is the first unit's own 255."""
    pruner = build_pruner("nvidia")
    still = torch.ones(4, 8, 6)
    assert pruner.choose(Video(still), 0.5).index.tolist() == list(range(16)), "the earlier of equal ones stay"
    assert pruner.choose(Video(noise(4, 8)), 0.8).index.tolist() == list(range(8))
    assert pruner.choose(Video(noise(1, 8)), 0.5).index.tolist() == list(range(8))
    scores = torch.cat([torch.full((8,), 255.0), changes_of(noise(4, 8)).flatten()])
    assert not bool((scores > torch.quantile(scores, 0.8)).any())


def test_counts() -> None:
    pairwise, iterative = build_pruner("nvidia"), build_pruner({"kind": "nvidia", "variant": "iterative"})
    assert [pairwise.num_retained(8, 16, rate) for rate in (0.0, 0.01, 0.5, 0.75, 0.9)] == [128, 126, 64, 32, 16]
    assert [iterative.num_retained(8, 16, rate) for rate in (0.0, 0.01, 0.5, 0.75, 0.9)] == [128, 121, 72, 44, 30]
    assert iterative.num_retained(8, 1, 0.5) == 1
    for count in range(1, 60):
        for rate in RATES:
            numbers = torch.randperm(count, dtype=torch.float64)
            assert above_quantile(count, rate) == int((numbers > torch.quantile(numbers, rate)).sum()), (count, rate)
    for pruner in (pairwise, iterative):
        with pytest.raises(ValueError, match=r"pruning_rate must be in \[0, 1\)"):
            pruner.num_retained(8, 16, 1.0)


@pytest.mark.parametrize("spec", [{}, {"metric": "cos"}, {"level": "pixels"}])
def test_iterative_adds_up_since_a_place_was_last_kept(spec: dict[str, str]) -> None:
    embeds = noise(9, 10)
    changes = changes_of(embeds, spec.get("metric", "l1"))
    for rate in RATES:
        kept, last = set(range(10)), [0] * 10
        for unit in range(1, 9):
            sums = [float(changes[last[place] : unit, place].double().sum()) for place in range(10)]
            order = sorted(range(10), key=lambda place: (-sums[place], place))
            for place in order[: above_quantile(10, rate)]:
                kept.add(unit * 10 + place)
                last[place] = unit
        pruner = build_pruner({"kind": "nvidia", "variant": "iterative", **spec})
        assert pruner.choose(video_of(embeds), rate).index.tolist() == sorted(kept), rate


def test_a_slow_drift_is_seen_by_iterative_alone() -> None:
    """One place drifts a little in each unit, the others jump to and fro by more every other unit."""
    embeds = torch.zeros(20, 8, 4)
    embeds[:, 1:] = (torch.arange(20) // 2 % 2).float()[:, None, None]
    embeds[:, 0] = 0.3 * torch.arange(20)[:, None]
    found: dict[str, Tensor] = {}
    for variant in ("pairwise", "iterative"):
        index = build_pruner({"kind": "nvidia", "variant": variant}).choose(Video(embeds), 0.8).index
        found[variant] = index[index >= 8] % 8
    assert 0 not in found["pairwise"].tolist()
    assert found["iterative"].tolist().count(0) >= 3


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"variant": "keyframe"}, "evs.method.variant must be one of pairwise, iterative, got 'keyframe'"),
        ({"level": ["pixels"]}, "evs.method.level must be one of features, pixels, got ['pixels']"),
        ({"metric": "l2"}, "evs.method.metric must be one of l1, cos, got 'l2'"),
        ({"level": "pixels", "metric": "cos"}, "evs.method.metric must be l1 between pixels, got cos"),
        ({"levels": "pixels"}, "evs.method.levels: unknown key of nvidia"),
    ],
)
def test_wrong_options_are_refused(spec: dict[str, Any], said: str) -> None:
    method: Method = {"kind": "nvidia", **spec}
    with pytest.raises(RecipeError) as caught:
        build_pruner(method)
    assert caught.value.message == said
