"""PruneVid's merging against plain loops, and cases made by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, groupby

import pytest
import torch
from torch import Tensor

from evs_train.errors import RecipeError
from evs_train.pruners import build_pruner
from evs_train.pruners.base import Choice, Video
from evs_train.pruners.prunevid import PruneVid, contiguous, shared_out, squared_distances

Point = list[float]
Slot = tuple[int, int]


def distance(one: Point, other: Point) -> float:
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) / len(one)


def cosine(one: Point, other: Point) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True)) / (math.hypot(*one) * math.hypot(*other))


def mean(points: Sequence[Point]) -> Point:
    return [sum(column) / len(points) for column in zip(*points, strict=True)]


def slow_centres(points: list[Point], count: int, neighbours: int) -> list[int]:
    """Places of the centres, written from the formula; squared distances, whose root keeps the order of scores."""
    away = [[distance(one, other) for other in points] for one in points]
    density = [math.exp(-sum(near := sorted(row)[:neighbours]) / len(near)) for row in away]
    scores = []
    for i, row in enumerate(away):
        denser = [j for j in range(len(points)) if (density[j], -j) > (density[i], -i)]
        scores.append(density[i] * math.sqrt(min((row[j] for j in denser), default=max(map(max, away)))))
    return sorted(sorted(range(len(points)), key=lambda i: (-scores[i], i))[:count])


def slow_segments(labels: list[int]) -> list[int]:
    """Scattered labels to segments."""
    runs = [list(run) for _, run in groupby(range(len(labels)), key=lambda unit: labels[unit])]
    longest = {label: max(len(run) for run in runs if labels[run[0]] == label) for label in labels}
    staying = [run for run in runs if len(run) == longest[labels[run[0]]] > 1]
    patched = []
    for unit in range(len(labels)):
        left = max((run for run in staying if run[0] <= unit), default=[])
        right = min((run for run in staying if run[-1] >= unit), default=[])
        patched.append(labels[(left if len(left) >= len(right) else right)[0]] if staying else 0)
    return [number for number, (_, run) in enumerate(groupby(patched)) for _ in run]


def slow_shares(sizes: dict[str, int], count: int) -> dict[str, int]:
    """Seats by largest remainder, one at a time."""
    if count <= len(sizes):
        largest = sorted(sizes, key=lambda name: -sizes[name])[:count]
        return {name: int(name in largest) for name in sizes}
    more, rest = {name: size - 1 for name, size in sizes.items()}, count - len(sizes)
    quota = {name: rest * own / max(1, sum(more.values())) for name, own in more.items()}
    seats = {name: math.floor(share + 1e-9) for name, share in quota.items()}
    for name in sorted(sizes, key=lambda name: seats[name] - quota[name])[: rest - sum(seats.values())]:
        seats[name] += 1
    return {name: 1 + own for name, own in seats.items()}


def slow(embeds: Tensor, count: int, pruner: PruneVid) -> tuple[list[int], list[int]]:
    """What `choose` gives for so many kept tokens: index and groups."""
    num_units, per_unit, _ = embeds.shape
    rows: list[list[Point]] = embeds.double().tolist()
    # Segments.
    means = [mean(unit) for unit in rows]
    found = slow_centres(means, max(1, int(num_units * pruner.segment_ratio)), pruner.neighbours)
    nearest = [min(found, key=lambda c, u=u: (c != u, distance(means[u], means[c]))) for u in range(num_units)]  # type: ignore[misc]
    labels = slow_segments(nearest)
    segments = [[unit for unit in range(num_units) if labels[unit] == label] for label in range(max(labels) + 1)]
    # Static places, merged in the order of their cosine.
    static: list[tuple[float, int, int]] = []
    for label, units in enumerate(segments):
        for place in range(per_unit):
            pairs = [cosine(rows[a][place], rows[b][place]) for a, b in combinations(units, 2)]
            if pairs and sum(pairs) / len(pairs) > pruner.tau:
                static.append((sum(pairs) / len(pairs), label, place))
    removable, joined = num_units * per_unit - count, set[tuple[int, int]]()
    for _, label, place in sorted(static, key=lambda one: (-one[0], one[1], one[2])):
        removable -= len(segments[label]) - 1
        if removable < 0:
            break
        joined.add((label, place))
    # Groups of what is left, each with its tokens by slot.
    groups: dict[str, dict[Slot, Point]] = {}
    for unit in range(num_units):
        units = segments[labels[unit]]
        for place in range(per_unit):
            if (labels[unit], place) not in joined:
                groups.setdefault(f"{unit} moving", {})[unit, place] = rows[unit][place]
            elif unit == units[0]:
                groups.setdefault(f"{unit} still", {})[unit, place] = mean([rows[u][place] for u in units])
    ordered = {
        name: groups[name]
        for unit in range(num_units)
        for name in (f"{unit} still", f"{unit} moving")
        if name in groups
    }
    shares = slow_shares({name: len(group) for name, group in ordered.items()}, count)
    centre_of: dict[Slot, Slot | None] = {}
    for name, group in ordered.items():
        slots, points = list(group), list(group.values())
        chosen = slow_centres(points, shares[name], pruner.neighbours)
        for i, slot in enumerate(slots):
            nearest = min(chosen, key=lambda j, i=i: (j != i, distance(points[i], points[j])), default=None)  # type: ignore[misc]
            centre_of[slot] = None if nearest is None else slots[nearest]
    kept = sorted({centre for centre in centre_of.values() if centre is not None})
    number = {centre: place for place, centre in enumerate(kept)}
    told = []
    for unit in range(num_units):
        for place in range(per_unit):
            slot = (segments[labels[unit]][0], place) if (labels[unit], place) in joined else (unit, place)
            centre = centre_of[slot]
            told.append(count if centre is None else number[centre])
    return [unit * per_unit + place for unit, place in kept], told


def scenes(num_units: int, per_unit: int, width: int, seed: int) -> Tensor:
    """Tokens that stand nearly still, drift or are new in every unit, with a cut at two thirds."""
    generator = torch.Generator().manual_seed(seed)
    still = torch.randn(2, 1, per_unit, width, generator=generator)
    units = torch.arange(num_units) * 3 // (2 * num_units)
    noise = torch.randn(num_units, per_unit, width, generator=generator)
    amount = torch.tensor([0.02, 0.3, 3.0])[torch.arange(per_unit) % 3]
    return still[units, 0] + amount[None, :, None] * noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_units", "per_unit"), [(1, 7), (2, 6), (3, 9), (8, 9), (9, 12), (12, 2)])
def test_the_choice_is_that_of_plain_loops(num_units: int, per_unit: int, dtype: torch.dtype) -> None:
    for seed, rate in enumerate((0.05, 0.2, 0.4, 0.6, 0.75, 0.9)):
        embeds = scenes(num_units, per_unit, 6, seed).to(dtype)
        pruner = PruneVid(tau=0.8, segment_ratio=0.4, neighbours=3 + seed)
        count = pruner.num_retained(num_units, per_unit, rate)
        found = pruner.choose(Video(embeds), rate)
        index, groups = slow(embeds, count, pruner)
        assert found.index.tolist() == index
        if count < num_units * per_unit:
            assert found.groups is not None
            assert found.groups.tolist() == groups
        else:
            assert groups == list(range(count))


def chosen(embeds: Tensor, rate: float, **options: float) -> tuple[Choice, Tensor]:
    """What is kept, and the group of each token (T, N)."""
    choice = PruneVid(**options).choose(Video(embeds), rate)  # type: ignore[arg-type]
    assert choice.groups is not None
    return choice, choice.groups.view(embeds.shape[:2])


def test_two_scenes_are_two_segments() -> None:
    """A rate of 0.75 leaves two units' worth of eight: one token for each place of each scene."""
    places = torch.eye(8)[:4]
    embeds = torch.stack([places + 5 * torch.eye(8)[6]] * 5 + [places + 5 * torch.eye(8)[7]] * 3)
    choice, groups = chosen(embeds, 0.75)
    assert choice.index.tolist() == [0, 1, 2, 3, 20, 21, 22, 23]
    assert groups.tolist() == [[0, 1, 2, 3]] * 5 + [[4, 5, 6, 7]] * 3
    assert torch.equal(choice.merged(embeds.flatten(0, 1)), embeds[[0, 5]].flatten(0, 1))


def test_a_still_background_is_one_token_for_each_place() -> None:
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, 16, 32, generator=generator).repeat(8, 1, 1)
    embeds[:, :4] = torch.randn(8, 4, 32, generator=generator)  # something moves over the first four places
    choice, groups = chosen(embeds, 1 - (12 + 32) / 128, segment_ratio=0.125)
    assert len(choice.index) == 12 + 8 * 4
    assert groups[:, 4:].tolist() == [list(range(4, 16))] * 8
    assert choice.index.tolist() == [*range(16), *(unit * 16 + place for unit in range(1, 8) for place in range(4))]


def test_the_most_alike_are_merged_first_and_no_more_than_the_rate_asks_for() -> None:
    """A higher rate merges what a lower one does, and more; what moves is untouched as long as that is enough."""
    embeds = scenes(8, 12, 16, 0)
    pruner, before = PruneVid(), torch.zeros(8, 12, dtype=torch.bool)
    segment = pruner.segments(embeds)
    for removable in range(0, 8 * 12, 5):
        joined = pruner.grouped(embeds, segment, removable).joined
        assert bool((joined | ~before).all())
        before = joined
    assert bool(before[:, 0::3].all())
    assert not bool(before[:, 2::3].any())
    _, groups = chosen(embeds, 0.3)
    assert int(groups[:, 2::3].flatten().unique().numel()) == 8 * 4


def test_static_is_more_alike_than_tau() -> None:
    embeds = torch.eye(4)[:, None].expand(4, 2, 4)  # all cosines are 0
    segment = torch.zeros(4, dtype=torch.int64)
    assert not bool(PruneVid(tau=0.0).grouped(embeds, segment, 8).joined.any())
    assert bool(PruneVid(tau=-0.1).grouped(embeds, segment, 8).joined.all())


def test_what_moves_is_clustered_within_its_unit() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = 10 * torch.randn(6, 2, 16, generator=generator)  # two kinds of tokens in each unit, new in every unit
    embeds = kinds[:, [0, 1, 1, 0, 1, 0, 0, 1]]
    choice, groups = chosen(embeds, 0.75)
    assert groups.tolist() == [[2 * unit + kind for kind in (0, 1, 1, 0, 1, 0, 0, 1)] for unit in range(6)]
    assert torch.equal(choice.merged(embeds.flatten(0, 1)), kinds.flatten(0, 1))


@pytest.mark.parametrize(
    ("labels", "segments"),
    [
        ("a", "0"),
        ("abcd", "0000"),  # nothing stays
        ("aabbb", "00111"),
        ("aabaaabb", "00000011"),  # the single b and the shorter a are open; both lie nearest to the longer a
        ("bbacc", "00011"),  # as long on both sides: to the left
        ("bbaccc", "001111"),
        ("abbcc", "00011"),
        ("bbccd", "00111"),
        ("aabbaa", "001122"),  # two longest ones
    ],
)
def test_scattered_clusters_become_runs(labels: str, segments: str) -> None:
    found = contiguous(torch.tensor([ord(label) for label in labels]))
    assert found.tolist() == [int(number) for number in segments]
    assert slow_segments([ord(label) for label in labels]) == found.tolist()


def test_distances_are_exact_where_tokens_share_much_and_nothing_where_they_are_equal() -> None:
    generator = torch.Generator().manual_seed(0)
    points = 1000 + torch.randn(2, 9, 64, generator=generator)
    points[:, 5] = points[:, 2] * (1 + 1e-7 * torch.randn(2, 64, generator=generator))  # the last bit
    found = squared_distances(points)
    expected = torch.cdist(points.double(), points.double()).square() / 64
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    assert found[:, 2, 5].tolist() == found[:, 5, 2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_equal_tokens_are_decided_by_their_place(fill: float) -> None:
    choice, groups = chosen(torch.full((4, 6, 8), fill), 0.5, tau=1.0)  # nothing is more alike than 1
    assert choice.index.tolist() == [0, 1, 2, 6, 7, 8, 12, 13, 14, 18, 19, 20]
    assert groups.tolist() == [[first, first + 1, first + 2, first, first, first] for first in (0, 3, 6, 9)]


def test_fewer_tokens_than_groups_leave_groups_out() -> None:
    embeds = torch.randn(12, 2, 16, generator=torch.Generator().manual_seed(0))
    choice, groups = chosen(embeds, 0.9)
    assert len(choice.index) == 2
    assert groups.tolist() == [[0, 0], [1, 1], *[[2, 2]] * 10]


@pytest.mark.parametrize(
    ("sizes", "count", "shares"),
    [
        ([5, 0, 3, 2], 10, [5, 0, 3, 2]),
        ([5, 0, 3, 2], 4, [2, 0, 1, 1]),
        ([5, 0, 3, 2], 3, [1, 0, 1, 1]),
        ([2, 5, 3, 5], 2, [0, 1, 0, 1]),
        ([100, 1, 1, 98], 102, [51, 1, 1, 49]),
        ([9, 9, 9], 4, [2, 1, 1]),
    ],
)
def test_tokens_are_shared_out_by_size(sizes: list[int], count: int, shares: list[int]) -> None:
    assert shared_out(torch.tensor(sizes), count).tolist() == shares


def test_shares_never_exceed_what_a_group_has() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        sizes = torch.randint(0, 9, (7,), generator=generator)
        total = int(sizes.sum())
        for count in range(1, total + 1):
            shares = shared_out(sizes, count)
            assert int(shares.sum()) == count
            assert bool((shares <= sizes).all())
            assert count < int((sizes > 0).sum()) or bool((shares > 0).eq(sizes > 0).all())


def test_mixed_precision_and_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    embeds = torch.randn(6, 48, 16, generator=torch.Generator().manual_seed(0))
    expected = PruneVid().choose(Video(embeds), 0.6)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = PruneVid().choose(Video(embeds), 0.6)
    monkeypatch.setattr("evs_train.pruners.prunevid.AT_ONCE", 2000)  # one unit, or 20 places, at a time
    parts = PruneVid().choose(Video(embeds), 0.6)
    for other in (mixed, parts):
        assert torch.equal(other.index, expected.index)
        assert torch.equal(other.groups, expected.groups)  # type: ignore[arg-type]


def test_the_published_method_counts_by_its_ratios() -> None:
    """Of 20 places 15 stand still for two segments: 15 + 4 * 5, then 7 + 4 * 5 (small groups stay), then 2 + 4 * 2."""
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, 20, 64, generator=generator).repeat(8, 1, 1)
    embeds[:4, :15], embeds[:, 15:] = 3 * embeds[:4, :15].flip(1), torch.randn(8, 5, 64, generator=generator)
    pruner = PruneVid()
    assert pruner.segments(embeds).tolist() == [0] * 4 + [1] * 4
    assert pruner.published_counts(embeds, pruner.segments(embeds), 0.5, 0.4) == (2 * 35, 2 * 27, 2 * 10)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tau": 1.5}, "evs.method.tau: must be a cosine"),
        ({"segment_ratio": 0.0}, "evs.method.segment_ratio: must be above 0"),
        ({"neighbours": 0}, "evs.method.neighbours: must be at least 1"),
        ({"taus": 0.8}, "evs.method.taus: unknown key of prunevid; did you mean tau?"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build_pruner({"kind": "prunevid", **options})
    assert said in f"{caught.value.message}; {caught.value.hint}"
