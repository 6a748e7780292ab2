"""PruneVid's merging (arXiv 2412.16117, part one): what stands still is merged over time, what is alike within a unit.

Units are cut into segments by clustering their means. A place whose tokens are alike throughout a segment (mean cosine
over all pairs of units above `tau`) is static, and its tokens there become one mean. The static tokens of a segment and
the other tokens of each unit are then clustered, each cluster to its mean. Clusters are those of DPC-KNN: centres are
dense among their `neighbours` and far from anything denser. Written from a description of the method; the published
code has a licence for non-commercial use and was not looked at.

Published is a ratio of clusters (.5) whatever the video; here exactly as many tokens stay as a rate says. So:

- They are shared out among the groups: one for each, the rest by largest remainder in proportion to what else it has. A
  group that gets as many as it has stays as it is. Fewer tokens than groups leave the smallest groups out: these drop.
- Static places are merged over time in the order of their cosine, as many as the rate has tokens to remove. The higher
  the rate the more of them; from some rate on all, and at rate 0 none.
- Segments are runs of units. Where a cluster is scattered its longest run stays, and what is left open joins the longer
  of the runs beside it. As published, but for lengths: there, what an earlier gap has joined counts as well.
- Of equal tokens the earlier wins, where published noise decides. Groups of any size are clustered, published: over 14.

With `alpha` the published part two follows inside the language model, see `question.py`; for evaluation alone.

A merged token stands at the place of its cluster's centre, one of static tokens in the segment's first unit.

Invariant: as of every pruner; distances in float32 whatever the dtype. Cost: T*N*N distances of D channels and as many
comparisons, for as many units at a time as fit into `AT_ONCE` numbers; the segments' means take T*N*D/2 float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F

from evs_train.pruners.base import Choice, Pruner, Selection, Video, highest

AT_ONCE = 2**24
"""Numbers in the largest tensors that a step over parts of a video holds; there are about five at a time."""
ROUNDING = 1e-6
"""Squared distances below this share of the points' own squares are what float32 leaves of zero."""
SMALL_GROUP = 14
"""Published: the largest group that is not clustered."""


@dataclass(frozen=True)
class Groups:
    """A video after merging over time.

    Attributes:
        segment: (T,) int64, ascending from 0: segment of each unit.
        first: (T,) int64: first unit of each unit's segment.
        joined: (T, N) bool: tokens that are merged over their segment, into one that stands in its first unit.
        means: (C, N, D) float32: means over the segments, C = T // 2 being the most there can be.
        sizes: (T, 2) int64: the groups that are clustered: merged tokens that stand in a unit, and its other tokens.
    """

    segment: Tensor
    first: Tensor
    joined: Tensor
    means: Tensor
    sizes: Tensor


@dataclass(frozen=True)
class PruneVid(Pruner):
    """Merge what stands still over a segment, then what is alike within a unit."""

    tau: float = 0.8
    segment_ratio: float = 0.25
    neighbours: int = 7
    alpha: float | None = None
    layer: float | str = "10/32"

    def __post_init__(self) -> None:
        if not -1 <= self.tau <= 1:
            raise ValueError(f"tau: must be a cosine, between -1 and 1, got {self.tau}")
        if not 0 < self.segment_ratio <= 1:
            raise ValueError(f"segment_ratio: must be above 0 and at most 1, got {self.segment_ratio}")
        if self.neighbours < 1:
            raise ValueError(f"neighbours: must be at least 1, got {self.neighbours}")
        if self.alpha is not None and not 0 < self.alpha <= 1:
            raise ValueError(f"alpha: must be above 0 and at most 1, got {self.alpha}")
        try:
            depth = Fraction(self.layer)
        except ValueError as error:
            raise ValueError(f"layer: must be a share of the layers, such as 10/32, got {self.layer!r}") from error
        if not 0 <= depth < 1:
            raise ValueError(f"layer: must be a share of the layers, at least 0 and below 1, got {self.layer}")

    @property
    def selection(self) -> Selection | None:
        return None if self.alpha is None else Selection(self.alpha, float(Fraction(self.layer)))

    @torch.no_grad()
    def choose(self, video: Video, pruning_rate: float) -> Choice:
        num_tokens = video.num_units * video.tokens_per_unit
        count = self.num_retained(video.num_units, video.tokens_per_unit, pruning_rate)
        if count == num_tokens:
            return Choice(torch.arange(num_tokens, device=video.embeds.device))
        with torch.autocast(video.embeds.device.type, enabled=False):
            groups = self.grouped(video.embeds, self.segments(video.embeds), num_tokens - count)
            centre, nearest = self._clusters(video.embeds, groups, shared_out(groups.sizes, count))
        number = centre.flatten().cumsum(0) - 1  # (T * N,) of each centre among all
        kept = torch.where(nearest < 0, count, number[nearest.clamp(min=0)])  # (T, N)
        kept = torch.where(groups.joined, kept[groups.first], kept)
        return Choice(highest(centre.flatten().int(), count), kept.flatten())

    def segments(self, embeds: Tensor) -> Tensor:
        """(T,) int64, ascending from 0: segment of each unit of a video (T, N, D)."""
        return contiguous(self.scattered(embeds))

    def scattered(self, embeds: Tensor) -> Tensor:
        """(T,) int64: the unit that is the centre of each unit's cluster."""
        count = max(1, int(len(embeds) * self.segment_ratio))
        squared = squared_distances(embeds.mean(1, dtype=torch.float32)[None])  # (1, T, T)
        together = torch.ones_like(squared, dtype=torch.bool)
        shares = torch.full((1, len(embeds)), count, device=embeds.device)
        return nearest_centre(squared, together, centres(squared, together, shares, self.neighbours))[0]

    def grouped(self, embeds: Tensor, segment: Tensor, removable: int) -> Groups:
        """Merge a video (T, N, D) over time, which removes at most so many tokens."""
        means, similarity, length = _of_segments(embeds, segment, max(1, len(embeds) // 2))
        static = similarity > self.tau
        order = similarity.masked_fill(~static, -math.inf).flatten().argsort(descending=True, stable=True)
        saved = torch.where(static, length - 1, 0).flatten()[order].cumsum(0)
        merged = static & torch.zeros_like(static).flatten().scatter(0, order, saved <= removable).view_as(static)
        joined = merged[segment]
        first = torch.searchsorted(segment, segment)
        is_first = first == torch.arange(len(embeds), device=embeds.device)
        sizes = torch.stack([joined.sum(1) * is_first, (~joined).sum(1)], 1)
        return Groups(segment, first, joined, means, sizes)

    def _clusters(self, embeds: Tensor, groups: Groups, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Cluster the tokens of each unit; `shares` (T, 2) centres for its groups.

        Returns:
            (T, N) bool, the centres; (T, N) int64, among T * N, the centre that each token belongs to, -1 for none.
            Tokens that are merged into an earlier unit are a group that has none.
        """
        num_units, per_unit, width = embeds.shape
        joined, found = groups.joined, []
        of_token = torch.where(joined, shares[:, :1], shares[:, 1:])  # (T, N)
        step = max(1, AT_ONCE // (per_unit * (per_unit + width)))
        for begin in range(0, num_units, step):
            part = slice(begin, begin + step)
            tokens = torch.where(joined[part, :, None], groups.means[groups.segment[part]], embeds[part].float())
            squared, same = squared_distances(tokens), joined[part, :, None] == joined[part, None]
            centre = centres(squared, same, of_token[part], self.neighbours)
            found.append((centre, nearest_centre(squared, same, centre)))
        centre, nearest = (torch.cat(parts) for parts in zip(*found, strict=True))
        start = torch.arange(num_units, device=embeds.device)[:, None] * per_unit
        return centre, torch.where(nearest < 0, -1, nearest + start)

    def published_counts(self, embeds: Tensor, segment: Tensor, cluster_ratio: float, share: float) -> tuple[int, ...]:
        """How many tokens the published method, which has no rate, leaves of a video (T, N, D). Waits for the device.

        Args:
            segment: as of `segments`.
            cluster_ratio: clusters to tokens of each group of more than `SMALL_GROUP` (beta).
            share: of the clusters of each group, what part two keeps (alpha).

        Returns:
            Numbers of tokens after merging over time, after clustering, and after part two.
        """
        groups = self.grouped(embeds, segment, embeds[..., 0].numel())
        sizes = groups.sizes.flatten().tolist()
        clusters = [int(size * cluster_ratio) if size > SMALL_GROUP else size for size in sizes]
        return sum(sizes), sum(clusters), sum(int(count * share) for count in clusters)


def contiguous(labels: Tensor) -> Tensor:
    """(T,) int64, ascending from 0: segments of units with these labels (T,), each of two units at least.

    Of each label the longest run stays, or the longest ones, unless they are single units. A unit that is left open
    joins the longer of the two runs nearest to it, the left one where both are as long. If none stays, all units are
    one segment.
    """
    num_units, place = len(labels), torch.arange(len(labels), device=labels.device)
    run = _numbered(labels)
    length = (run[:, None] == run).sum(1)
    stays = (length > 1) & (length == (length * (labels[:, None] == labels)).amax(1))
    left = place.where(stays, -1).cummax(0).values
    right = place.where(stays, num_units).flip(0).cummin(0).values.flip(0)
    of_left = length[left.clamp(min=0)].where(left >= 0, 0)
    of_right = length[right.clamp(max=num_units - 1)].where(right < num_units, 0)
    return _numbered(labels[torch.where(of_left >= of_right, left, right).clamp(min=0)])


def _numbered(labels: Tensor) -> Tensor:
    """(T,) int64: number of the run of equal labels that each belongs to."""
    return F.pad(labels[1:] != labels[:-1], (1, 0)).cumsum(0)


def _of_segments(embeds: Tensor, segment: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means of each place over each segment, their cosine, and the segments' lengths.

    Returns:
        (C, N, D) float32; (C, N) mean cosine over all pairs of units; (C, 1) int64. Zeros where there is no segment.
    """
    member = (segment == torch.arange(count, device=segment.device)[:, None]).float()  # (C, T)
    length = member.sum(1, keepdim=True)  # (C, 1)
    means, similarity = [], []
    for some in embeds.split(max(1, AT_ONCE // embeds[:, 0].numel()), dim=1):
        rows = some.float()  # (T, n, D)
        means.append((member / length.clamp(min=1) @ rows.flatten(1)).unflatten(1, rows.shape[1:]))
        sums = (member @ F.normalize(rows, dim=-1).flatten(1)).unflatten(1, rows.shape[1:])
        similarity.append((sums.square().sum(-1) - length) / (length * (length - 1)).clamp(min=1))
    return torch.cat(means, 1), torch.cat(similarity, 1), length.long()


def squared_distances(points: Tensor) -> Tensor:
    """(B, M, M) squared distances of points (B, M, D) float32, divided by D. Those of equal points are 0."""
    points = points - points.mean(1, keepdim=True)  # what all have in common would cost digits
    products = points @ points.mT
    squares = products.diagonal(dim1=1, dim2=2)
    sums = squares[:, :, None] + squares[:, None]
    squared = sums - 2 * products
    return torch.where(squared > ROUNDING * sums, squared, 0.0) / points.shape[-1]


def centres(squared: Tensor, same: Tensor, shares: Tensor, neighbours: int) -> Tensor:
    """The centres of DPC-KNN (B, M) bool, `shares` (B, M) of them in the group of each point.

    A point's density is exp(-mean squared distance to its nearest neighbours, itself among them), its score that times
    its distance to the nearest denser point of its group. Their logarithms are compared: far apart, exp would be 0.

    Args:
        squared: (B, M, M) squared distances.
        same: (B, M, M) bool: points of one group.
        shares: at most the size of the group.
        neighbours: only those of the same group count, even if there are fewer.
    """
    near = squared.masked_fill(~same, math.inf).topk(min(neighbours, squared.shape[-1]), largest=False).values
    there = near.isfinite()
    density = -near.where(there, 0.0).sum(-1) / there.sum(-1)  # (B, M) its logarithm
    denser = _before(density) & same
    away = squared.masked_fill(~denser, math.inf).amin(-1)  # infinite for the densest, which is a centre in any case
    rank = (_before(0.5 * away.log() + density) & same).sum(-1)
    return rank < shares


def nearest_centre(squared: Tensor, same: Tensor, centre: Tensor) -> Tensor:
    """(B, M) int64: the nearest centre of each point's group; a centre's is itself, -1 where the group has none."""
    distance, place = squared.masked_fill(~(same & centre[:, None]), math.inf).min(-1)
    own = torch.arange(squared.shape[-1], device=squared.device)
    return torch.where(centre, own, torch.where(distance.isinf(), -1, place))


def _before(values: Tensor) -> Tensor:
    """(B, M, M) bool, [b, i, j]: point j has a higher value than i, or the same one and stands earlier."""
    own, other = values[:, :, None], values[:, None]
    place = torch.arange(values.shape[-1], device=values.device)
    return (other > own) | ((other == own) & (place < place[:, None]))


def shared_out(sizes: Tensor, count: int) -> Tensor:
    """Divide `count` among groups of these sizes, which have at least as many together. Same shape, int64.

    One for each group that is not empty (if there are too few, for the largest), the rest in proportion to sizes less
    one, by largest remainder. So no group gets more than it has. Of equal groups the earlier wins.
    """
    flat = sizes.flatten()
    ones = (_first(flat, count) & (flat > 0)).long()
    rest, more = count - ones.sum(), (flat - 1).clamp(min=0)
    total = more.sum().clamp(min=1)
    whole, remainder = rest * more // total, rest * more % total
    return (ones + whole + _first(remainder, rest - whole.sum())).view_as(sizes)


def _first(values: Tensor, count: int | Tensor) -> Tensor:
    """(G,) bool: the `count` highest values; of equal ones the earlier."""
    order = values.argsort(descending=True, stable=True)
    places = torch.arange(len(values), device=values.device)
    return torch.zeros_like(values, dtype=torch.bool).scatter(0, order, places < count)


PRUNER = PruneVid
