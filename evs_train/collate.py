"""Host half of pruning: examples to a batch with its rate and its plan. The device half is `prune.py`.

How many tokens every video keeps is known before anything is encoded (`Pruner.num_retained`), so the host plans all
shapes: which flat positions always stay, which belong to videos, and where each retained token goes. Rows are padded on
the right, which cannot reach earlier tokens in a causal model, hybrid or not, or joined to one sequence (`packing`).

Invariant: a plan needs no tensor and equals what the device half then does. Cost: one pass over index arrays.
This module does not decode, tokenize, encode or choose.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evs_train.data.batches import Examples
from evs_train.data.chat import Example, Media, MediaItem
from evs_train.data.quarantine import BadSample, NoneLeftError
from evs_train.data.template import IGNORE_INDEX
from evs_train.errors import EvsTrainError
from evs_train.pruners.base import Pruner
from evs_train.pruners.evs import EVS
from evs_train.rates import Rates


@dataclass(frozen=True)
class PlannedItem:
    """One video or image of a batch: where it stands, its rate, and how many of its tokens stay.

    `seed` is of what a pruner draws at random: one for each row of a step, the same in all its passes.
    """

    row: int
    item: MediaItem
    pruning_rate: float
    num_retained: int
    frames: np.ndarray | None = None
    seed: int = 0


@dataclass(frozen=True)
class BatchPlan:
    """Everything about a pruned batch that the host knows. Holds no tensors, so it stays on the host.

    Attributes:
        draws: place of each row in the global order; `sample_ids` names the rows.
        shares: of the sampled frames that each row shows.
        step: optimizer step the batch belongs to.
        rates: the rate drawn for each row, before any cap per video.
        items: media of all rows, in reading order.
        num_tokens: length of each row after pruning.
        shape: of the pruned batch: (rows, longest length), or (1, sum of lengths) when its rows are packed.
        num_supervised: supervised tokens of each row.
        bad: for each row, the samples that its draw met before and could not read.
        decoded_by: what decoded each video (see `Clip.backend`).
    """

    draws: tuple[int, ...]
    sample_ids: tuple[str, ...]
    shares: tuple[float, ...]
    step: int
    rates: tuple[float, ...]
    items: tuple[PlannedItem, ...]
    num_tokens: tuple[int, ...]
    shape: tuple[int, int]
    num_supervised: tuple[int, ...]
    bad: tuple[tuple[BadSample, ...], ...]
    decoded_by: tuple[str, ...] = ()

    @property
    def packed(self) -> bool:
        """Several rows stand in one sequence. One row alone is neither packed nor padded."""
        return self.shape[0] < len(self.draws)

    @property
    def videos(self) -> tuple[PlannedItem, ...]:
        return tuple(planned for planned in self.items if planned.item.kind == "video")

    @property
    def applied_rates(self) -> tuple[float | None, ...]:
        """Share of its video tokens that each row loses, which the cap and the first unit keep below the drawn rate."""
        rates: list[float | None] = []
        for row in range(len(self.draws)):
            counts = [(p.item.num_tokens, p.num_retained) for p in self.videos if p.row == row]
            before, after = sum(b for b, _ in counts), sum(a for _, a in counts)
            rates.append(1 - after / before if before else None)
        return tuple(rates)

    @property
    def video_tokens_before(self) -> int:
        return sum(planned.item.num_tokens for planned in self.videos)

    @property
    def video_tokens_after(self) -> int:
        return sum(planned.num_retained for planned in self.videos)


@dataclass(frozen=True)
class Collator:
    """Host half: the examples of one micro-batch to one batch.

    The batch holds `input_ids` and `labels` (B, L) unpruned and padded on the right, `position_ids` (P, B, L) where the
    family has them, `media` (encoder inputs of all rows in order), `plan` (`BatchPlan`) and `index`, flat tensors:
    `always` (int64 positions in B*L that stay whatever is chosen), `video` (int64 positions of all video tokens, in
    the order of the batch), `target` (int64 places of the retained tokens in the pruned batch, ascending) and
    `boundaries` ((B + 1,) int32, where each row begins in the joined sequence, and its length). With `sequential` it
    holds `sequential_ids` (*plan.shape), the pruned batch's positions, instead of `position_ids`. With `further` it
    holds `further`: for each of them a mapping of the `plan`, `index` and `sequential_ids` of another pass.
    Where the pruner looks at pixels it holds `changes`: (T, N) float32 of each video (`Example.changes`).
    An example that is an error makes the batch `{"error": error, "bad": ...}`, where `bad` has for each row the samples
    that could not be read and the id of the one that it shows instead, or None.

    Attributes:
        sequential: number the retained tokens of a row 0, 1, 2, ... instead of keeping their positions.
        packing: join the rows of a batch to one sequence after pruning, instead of padding them.
        further: rates of further passes over the same rows. Their plans carry no frames.
        pruner: says how many tokens stay; the device half must have the same.
    """

    rates: Rates
    pad_token_id: int
    merge_media: Callable[[Sequence[Media]], Media]
    sequential: bool = False
    packing: bool = False
    further: tuple[Rates, ...] = ()
    pruner: Pruner = EVS

    def __call__(self, read: Sequence[Examples]) -> dict[str, Any]:
        """The batch of one micro-batch: the loader hands over a list of one."""
        (examples,) = read
        rows = [example for example in examples.rows if isinstance(example, Example)]
        errors = [example for example in examples.rows if isinstance(example, EvsTrainError)]
        if errors:
            bad: list[tuple[tuple[BadSample, ...], str | None]] = [(row.bad, row.sample_id) for row in rows]
            bad += [(error.bad, None) for error in errors if isinstance(error, NoneLeftError)]
            return {"error": errors[0], "bad": bad}
        length = max(len(row.input_ids) for row in rows)
        batch: dict[str, Any] = {
            "input_ids": _pad([row.input_ids for row in rows], length, self.pad_token_id),
            "labels": _pad([row.labels for row in rows], length, IGNORE_INDEX),
            "media": self.merge_media([row.media for row in rows]),
            **self._of_pass(rows, self.plan(rows, examples.step), length),
        }
        positions = [row.position_ids for row in rows if row.position_ids is not None]
        if positions and not self.sequential:
            batch["position_ids"] = _pad(positions, length, 0).transpose(0, 1)  # (B, P, L) -> (P, B, L)
        if self.pruner.needs_changes:
            batch["changes"] = [change for row in rows for change in row.changes]
        if self.further:
            unseen = [dataclasses.replace(row, frames=()) for row in rows]
            plans = [dataclasses.replace(self, rates=rates).plan(unseen, examples.step) for rates in self.further]
            batch["further"] = [self._of_pass(rows, plan, length) for plan in plans]
        return batch

    def _of_pass(self, rows: Sequence[Example], plan: BatchPlan, length: int) -> dict[str, Any]:
        """What differs between two passes over the same rows."""
        of_pass: dict[str, Any] = {"plan": plan, "index": _index(rows, plan, length)}
        if self.sequential:
            of_pass["sequential_ids"] = _sequential(plan)
        return of_pass

    def plan(self, rows: Sequence[Example], step: int) -> BatchPlan:
        """Rates and retained counts of a batch of this optimizer step; needs no tensor of it."""
        rates, items, lengths = [], [], []
        for number, row in enumerate(rows):
            rates.append(self.rates.of_row(row.draw, step))
            frames = iter(row.frames)
            planned = [
                PlannedItem(
                    number,
                    item,
                    pruning_rate := self.rates.of_video(row.draw, step, item.num_units),
                    self.pruner.num_retained(item.num_units, item.tokens_per_unit, pruning_rate),
                    next(frames, None),
                    seed_of(self.rates.seed, row.sample_id, step),
                )
                if item.kind == "video"
                else PlannedItem(number, item, 0.0, item.num_tokens)
                for item in row.items
            ]
            items += planned
            lengths.append(len(row.input_ids) - sum(p.item.num_tokens - p.num_retained for p in planned))
        return BatchPlan(
            draws=tuple(row.draw for row in rows),
            sample_ids=tuple(row.sample_id for row in rows),
            shares=tuple(row.share for row in rows),
            step=step,
            rates=tuple(rates),
            items=tuple(items),
            num_tokens=tuple(lengths),
            shape=(1, sum(lengths)) if self.packing else (len(rows), max(lengths)),
            num_supervised=tuple(int((row.labels != IGNORE_INDEX).sum()) for row in rows),
            bad=tuple(row.bad for row in rows),
            decoded_by=tuple(backend for row in rows for backend in row.decoded_by),
        )


def seed_of(seed: int, sample_id: str, step: int) -> int:
    """What a pruner draws with for the videos of a row: 63 bits, the same wherever the row is shown in this step."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {sample_id}".encode()).digest()[:8], "big") >> 1


def _pad(tensors: Sequence[Tensor], length: int, value: int) -> Tensor:
    """Stack tensors of shape (..., L_i) to (B, ..., length), padded on the right."""
    return torch.stack([nn.functional.pad(t, (0, length - t.shape[-1]), value=value) for t in tensors])


def _index(rows: Sequence[Example], plan: BatchPlan, length: int) -> dict[str, Tensor]:
    always, video = [], [torch.empty(0, dtype=torch.int64)]
    for number, row in enumerate(rows):
        stays = torch.ones(len(row.input_ids), dtype=torch.bool)
        for item, span in zip(row.items, row.spans, strict=True):
            if item.kind == "video":
                stays[span] = False
                video.append(span + number * length)
        always.append(torch.nonzero(stays)[:, 0] + number * length)
    starts = np.cumsum([0, *plan.num_tokens])
    return {
        "always": torch.cat(always),
        "video": torch.cat(video),
        "target": torch.cat(
            [
                torch.arange(count) + int(starts[row] if plan.packed else row * plan.shape[1])
                for row, count in enumerate(plan.num_tokens)
            ]
        ),
        "boundaries": torch.from_numpy(starts.astype(np.int32)),
    }


def _sequential(plan: BatchPlan) -> Tensor:
    """(*plan.shape) int64: place of each token in its row, 0 where there is padding."""
    rows = [torch.arange(count) for count in plan.num_tokens]
    return torch.cat(rows)[None] if plan.packed else _pad(rows, plan.shape[1], 0)
