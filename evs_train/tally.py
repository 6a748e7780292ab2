"""What a run counts between two logs: what was pruned, and the loss by rate and by pass.

Invariant: local to a rank until `collect` sums over ranks. Cost: a sum of the losses per pass, one all-reduce of a few
numbers per log. This module computes no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evs_train.collate import BatchPlan

RATE_BUCKETS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Upper ends (inclusive) of the buckets in which the loss is reported; the first is for videos that stayed dense."""
_NO_VIDEO = len(RATE_BUCKETS)  # bucket of rows that have no video
_NUM_BUCKETS = len(RATE_BUCKETS) + 1

BACKENDS = ("decord", "pyav", "images")
_COUNTS = (
    "rows",
    "shortened",
    "rate",
    "video_rows",
    "rate_applied",
    "tokens",
    "padding",
    "supervised",
    "video_tokens_before",
    "video_tokens_after",
    *(f"decoded/{backend}" for backend in BACKENDS),
)


def bucket_of(applied_rate: float | None) -> int:
    """Bucket of a row that lost this share of its video tokens, or has no video (None)."""
    if applied_rate is None:
        return _NO_VIDEO
    return next(index for index, end in enumerate(RATE_BUCKETS) if applied_rate <= end)


def bucket_name(index: int) -> str:
    """Metric name of a bucket, such as `loss/rate_0.5-0.75`."""
    if index == _NO_VIDEO:
        return "loss/no_video"
    return "loss/rate_0" if index == 0 else f"loss/rate_{RATE_BUCKETS[index - 1]:g}-{RATE_BUCKETS[index]:g}"


class Tally:
    """Sums since the last log, and since the start. Local to a rank.

    `names` are further sums over the supervised tokens of the drawn pass, whose means are reported as `loss/NAME`.
    `hides`: some kept tokens are not seen by attention, and these are counted, too.
    """

    def __init__(self, names: Sequence[str] = (), *, hides: bool = False) -> None:
        self._hides = hides
        self.total: dict[str, float] = dict.fromkeys(_COUNTS, 0.0)
        self._names = tuple(names)
        self._counts = dict.fromkeys(_COUNTS, 0.0)
        self._bucket_tokens = [0.0] * _NUM_BUCKETS
        self._losses: Tensor | None = None  # of each bucket, then of each name, then the hidden tokens

    def add(self, plan: BatchPlan, hidden: Tensor | None = None) -> None:
        """Count one micro-batch, its passes apart, and the `hidden` tokens among those it keeps."""
        applied = plan.applied_rates
        seen = {
            "rows": len(plan.draws),
            "shortened": sum(share < 1 for share in plan.shares),
            "rate": sum(plan.rates),
            "video_rows": sum(rate is not None for rate in applied),
            "rate_applied": sum(rate for rate in applied if rate is not None),
            "supervised": sum(plan.num_supervised),
            "video_tokens_before": plan.video_tokens_before,
            "video_tokens_after": plan.video_tokens_after,
            **{f"decoded/{backend}": plan.decoded_by.count(backend) for backend in BACKENDS},
        }
        for name, value in seen.items():
            self._counts[name] += value
        if hidden is not None:
            self._sums(hidden.device)[-1] += hidden

    def add_pass(self, plan: BatchPlan, losses: Tensor, name: str | None = None) -> None:
        """Count the tokens of one pass that is trained on, and its losses (S,) by rate and in the sum `name`."""
        self.add_computed(plan)
        buckets = [bucket_of(rate) for rate in plan.applied_rates]
        for bucket, count in zip(buckets, plan.num_supervised, strict=True):
            self._bucket_tokens[bucket] += count
        exact = losses.detach().double()
        counts = torch.tensor(plan.num_supervised)
        of_token = torch.tensor(buckets).repeat_interleave(counts, output_size=len(losses))
        self._sums(losses.device).index_add_(0, of_token.to(losses.device, non_blocking=True), exact)
        if name is not None:
            self.add_sum(name, exact.sum())

    def add_computed(self, plan: BatchPlan) -> None:
        """Count the tokens that one pass computes."""
        self._counts["tokens"] += sum(plan.num_tokens)
        self._counts["padding"] += plan.shape[0] * plan.shape[1] - sum(plan.num_tokens)

    def add_sum(self, name: str, value: Tensor) -> None:
        """Add a scalar to the sum `name`."""
        self._sums(value.device)[_NUM_BUCKETS + self._names.index(name)] += value.detach()

    @property
    def _num_sums(self) -> int:
        return _NUM_BUCKETS + len(self._names) + self._hides

    def _sums(self, device: torch.device) -> Tensor:
        if self._losses is None:
            self._losses = torch.zeros(self._num_sums, device=device, dtype=torch.float64)
        return self._losses

    def state(self) -> tuple[dict[str, float], list[float], Tensor | None]:
        """What was counted since the last `collect`, for `restore`."""
        return dict(self._counts), list(self._bucket_tokens), None if self._losses is None else self._losses.clone()

    def restore(self, state: tuple[dict[str, float], list[float], Tensor | None]) -> None:
        """Take back what was counted since `state`."""
        self._counts, self._bucket_tokens, self._losses = state

    def sums(self) -> list[float]:
        """What was counted since the last `collect`, as numbers that `add_sums` takes. Waits for the device."""
        losses = [0.0] * self._num_sums if self._losses is None else self._losses.tolist()
        return [*self._counts.values(), *self._bucket_tokens, *losses]

    def add_sums(self, sums: Sequence[float], device: torch.device) -> None:
        """Count what `sums` says in addition."""
        for name, value in zip(_COUNTS, sums, strict=False):
            self._counts[name] += value
        rest = sums[len(_COUNTS) :]
        self._bucket_tokens = [a + b for a, b in zip(self._bucket_tokens, rest, strict=False)]
        self._sums(device).add_(torch.tensor(rest[_NUM_BUCKETS:], dtype=torch.float64, device=device))

    def collect(self, reduce: Any, device: torch.device) -> dict[str, float]:
        """Counts and mean losses since the last call, summed over ranks by `reduce(tensor)`."""
        counts = torch.tensor([*self._counts.values(), *self._bucket_tokens], dtype=torch.float64)
        summed = reduce(torch.cat([counts.to(device), self._sums(device).to(device)])).tolist()
        collected = dict(zip(_COUNTS, summed, strict=False))
        for name, value in collected.items():
            self.total[name] += value
        tokens, losses = summed[len(_COUNTS) : len(counts)], summed[len(counts) :]
        for index, count in enumerate(tokens):
            if count:
                collected[bucket_name(index)] = losses[index] / count
        if self._hides:
            collected["video_tokens_seen"] = collected["video_tokens_after"] - losses.pop()
        for name, loss in zip(self._names, losses[_NUM_BUCKETS:], strict=True):
            collected[f"loss/{name}"] = loss / max(collected["supervised"], 1)
        self._counts = dict.fromkeys(_COUNTS, 0.0)
        self._bucket_tokens = [0.0] * _NUM_BUCKETS
        self._losses = None
        return collected
