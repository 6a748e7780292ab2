"""Examples to a batch with its rate and plan (host half), and that batch to the pruned one (device half).

The host half knows how many tokens every video keeps before anything is encoded (`evs.retained_tokens`), so it plans
all shapes: which flat positions always stay, which belong to videos, and where each retained token goes. It pads on the
right, which cannot reach earlier tokens in a causal model, hybrid or not. The device half is a forward pre-hook on the
model that the trainer was given: it encodes the media once, lets EVS choose, and moves ids, labels, positions and
features together by one index. It runs inside forward, hence inside DDP and DeepSpeed, and leaves the model's class,
`state_dict` and `save_pretrained` alone.

Invariants: the number of supervised tokens never changes; at rate 0 the batch is the unpruned one; the mask is always
explicit, since without one transformers takes the position gaps that pruning leaves for document boundaries; the device
half's selection and compaction have fixed shapes and no host-device synchronisation (the encoders of transformers have
theirs; under ZeRO-3 `_num_calls` adds one).
Cost: on the host one pass over index arrays; on the device a sort of the retained indices and one gather per tensor.
This module does not decode, tokenize or compute a loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from evs_train import evs
from evs_train.data.chat import IGNORE_INDEX, Example, Kind, Media, MediaItem
from evs_train.errors import EvsTrainError
from evs_train.models.base import Family, Features
from evs_train.samplers import RateSampler, cap_rate
from evs_train.timing import Stopwatch

KINDS: tuple[Kind, ...] = ("image", "video")


@dataclass(frozen=True)
class PlannedItem:
    """One video or image of a batch: where it stands, its rate, and how many of its tokens stay."""

    row: int
    item: MediaItem
    pruning_rate: float
    num_retained: int
    frames: np.ndarray | None = None


@dataclass(frozen=True)
class BatchPlan:
    """Everything about a pruned batch that the host knows. Holds no tensors, so it stays on the host.

    Attributes:
        draws: place of each row in the global order; `sample_ids` names the rows.
        step: optimizer step the batch belongs to.
        rates: the rate drawn for each row, before any cap per video.
        items: media of all rows, in reading order.
        num_tokens: length of each row after pruning.
        padded_length: length of the pruned batch.
        num_supervised: supervised tokens of each row.
    """

    draws: tuple[int, ...]
    sample_ids: tuple[str, ...]
    step: int
    rates: tuple[float, ...]
    items: tuple[PlannedItem, ...]
    num_tokens: tuple[int, ...]
    padded_length: int
    num_supervised: tuple[int, ...]

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
    """Host half: a list of examples to one batch.

    The batch holds `input_ids` and `labels` (B, L) unpruned and padded on the right, `position_ids` (P, B, L) where the
    family has them, `media` (encoder inputs of all rows in order), `plan` (`BatchPlan`) and `index`, three flat int64
    tensors: `always` (positions in B*L that stay whatever EVS chooses), `video` (positions of all video tokens, in the
    order of the batch) and `target` (places in the pruned B*L' of the retained tokens, ascending).
    An example that is an error makes the batch `{"error": error}`.

    Attributes:
        global_batch: draws per optimizer step, over all ranks and micro-batches.
        per_sample: one rate per sample instead of one per optimizer step.
        cap: keep each video's rate low enough that more than its first unit is left.
    """

    sampler: RateSampler
    seed: int
    global_batch: int
    pad_token_id: int
    merge_media: Callable[[Sequence[Media]], Media]
    per_sample: bool = False
    cap: bool = True

    def __call__(self, examples: Sequence[Example | EvsTrainError]) -> dict[str, Any]:
        rows: list[Example] = []
        for example in examples:
            if isinstance(example, EvsTrainError):
                return {"error": example}
            rows.append(example)
        plan = self.plan(rows)
        length = max(len(row.input_ids) for row in rows)
        batch: dict[str, Any] = {
            "input_ids": _pad([row.input_ids for row in rows], length, self.pad_token_id),
            "labels": _pad([row.labels for row in rows], length, IGNORE_INDEX),
            "media": self.merge_media([row.media for row in rows]),
            "plan": plan,
            "index": _index(rows, plan, length),
        }
        positions = [row.position_ids for row in rows if row.position_ids is not None]
        if positions:
            batch["position_ids"] = _pad(positions, length, 0).transpose(0, 1)  # (B, P, L) -> (P, B, L)
        return batch

    def draw_rates(self, draw: int, units: Sequence[int]) -> tuple[float, list[float]]:
        """The rate of one row, and of each of its videos given their numbers of temporal units."""
        step = draw // self.global_batch
        index = draw if self.per_sample else step
        of_row = self.sampler.rate(self.seed, index, step=step, num_units=None)
        of_videos = [self.sampler.rate(self.seed, index, step=step, num_units=num_units) for num_units in units]
        if self.cap:
            of_videos = [cap_rate(rate, num_units) for rate, num_units in zip(of_videos, units, strict=True)]
        return of_row, of_videos

    def plan(self, rows: Sequence[Example]) -> BatchPlan:
        """Rates and retained counts of a batch; needs no tensor of it."""
        rates, items, lengths = [], [], []
        for number, row in enumerate(rows):
            videos = [item for item in row.items if item.kind == "video"]
            rate, of_videos = self.draw_rates(row.draw, [video.num_units for video in videos])
            rates.append(rate)
            video_rates, frames = iter(of_videos), iter(row.frames)
            planned = [
                PlannedItem(
                    number,
                    item,
                    pruning_rate := next(video_rates),
                    evs.retained_tokens(item.num_units, item.tokens_per_unit, pruning_rate),
                    next(frames, None),
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
            step=rows[0].draw // self.global_batch,
            rates=tuple(rates),
            items=tuple(items),
            num_tokens=tuple(lengths),
            padded_length=max(lengths),
            num_supervised=tuple(int((row.labels != IGNORE_INDEX).sum()) for row in rows),
        )


def _pad(tensors: Sequence[Tensor], length: int, value: int) -> Tensor:
    """Stack tensors of shape (..., L_i) to (B, ..., length), padded on the right."""
    return torch.stack([nn.functional.pad(t, (0, length - t.shape[-1]), value=value) for t in tensors])


def _index(rows: Sequence[Example], plan: BatchPlan, length: int) -> dict[str, Tensor]:
    always, video, target = [], [torch.empty(0, dtype=torch.int64)], []
    for number, (row, num_tokens) in enumerate(zip(rows, plan.num_tokens, strict=True)):
        stays = torch.ones(len(row.input_ids), dtype=torch.bool)
        for item, span in zip(row.items, row.spans, strict=True):
            if item.kind == "video":
                stays[span] = False
                video.append(span + number * length)
        always.append(torch.nonzero(stays)[:, 0] + number * length)
        target.append(torch.arange(num_tokens) + number * plan.padded_length)
    return {"always": torch.cat(always), "video": torch.cat(video), "target": torch.cat(target)}


def compact(batch: dict[str, Any], selected: Sequence[Tensor], pad_token_id: int) -> dict[str, Tensor]:
    """Move ids, labels and positions of the retained tokens together.

    Args:
        batch: a batch of `Collator`, on the device.
        selected: for each video of the batch, the (K,) int64 indices of its retained tokens.

    Returns:
        `input_ids`, `labels`, `attention_mask` (B, L') int64 and, where the batch has them, `position_ids` (P, B, L').
    """
    plan: BatchPlan = batch["plan"]
    index: dict[str, Tensor] = batch["index"]
    of_videos = index["video"].split([planned.item.num_tokens for planned in plan.videos])
    kept = [places[chosen] for places, chosen in zip(of_videos, selected, strict=True)]
    source = torch.cat([index["always"], *kept]).sort().values  # (sum of retained lengths,)
    target = index["target"]
    shape = (len(plan.draws), plan.padded_length)

    def moved(values: Tensor, fill: int) -> Tensor:
        flat = values.new_full((shape[0] * shape[1],), fill)
        return flat.index_copy(0, target, values.flatten()[source]).view(shape)

    out = {
        "input_ids": moved(batch["input_ids"], pad_token_id),
        "labels": moved(batch["labels"], IGNORE_INDEX),
        "attention_mask": moved(torch.ones_like(batch["input_ids"]), 0),
    }
    if "position_ids" in batch:
        out["position_ids"] = torch.stack([moved(row, 0) for row in batch["position_ids"]])
    return out


@dataclass
class EvsHook:
    """Device half: a forward pre-hook that prunes a batch of `Collator` on its way into the model.

    A forward call without a `plan` (generation, plain evaluation) passes through untouched.

    Attributes:
        model: the plain transformers model inside whatever wraps it.
        engine_score: score what serving scores for the family, rather than the pooled embeddings alone.
        float32_score: upcast before scoring. Serving does not.
        encoder_trains: the vision tower or projector has trainable parameters. In training every rank then encodes
            at least one medium (a blank one, of which nothing is kept), or its gradients would be missing elsewhere.
        equal_calls: all ranks must call the tower equally often, as ZeRO-3 needs: its modules gather their weights by
            collectives.
        autocast: makes the mixed-precision context that the forward runs in.
        labels: (B, L') labels of the last pruned batch.
        kept: (planned video, (K,) selected) of every video whose plan carries frames, until somebody clears it.
    """

    family: Family
    model: nn.Module
    engine_score: bool = True
    float32_score: bool = False
    encoder_trains: bool = False
    equal_calls: bool = False
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    labels: Tensor = field(default_factory=lambda: torch.empty(0))
    kept: list[tuple[PlannedItem, Tensor]] = field(default_factory=list)

    def attach(self, module: nn.Module) -> RemovableHandle:
        """Register on `module`, the outermost one that the trainer is given (a PEFT model bypasses inner hooks)."""
        return module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if "plan" not in kwargs:
            return None
        keys = ("input_ids", "labels", "media", "plan", "index", "position_ids")
        batch: dict[str, Any] = {key: kwargs.pop(key) for key in keys if key in kwargs}
        plan: BatchPlan = batch["plan"]
        with self.autocast():
            with self.stopwatch.section("encoder"):
                encoded, blanks = self._encode(batch["media"], training=module.training)
            with self.stopwatch.section("pruning"):
                selected = [
                    self._select(planned, features)
                    for planned, features in zip(plan.videos, encoded["video"], strict=True)
                ]
                remaining: dict[Kind, Any] = {
                    "image": iter(encoded["image"]),
                    "video": iter(
                        [
                            [layer[chosen] for layer in features]
                            for features, chosen in zip(encoded["video"], selected, strict=True)
                        ]
                    ),
                }
                features = [(planned.item.kind, next(remaining[planned.item.kind])) for planned in plan.items]
                pruned = compact(batch, selected, self.family.pad_token_id)
        self.labels = pruned["labels"]
        self.kept += [(p, chosen) for p, chosen in zip(plan.videos, selected, strict=True) if p.frames is not None]
        outputs = self.family.encoder_outputs(features + blanks)
        return args, {**kwargs, **pruned, "mm_encoder_outputs": outputs}

    def _select(self, planned: PlannedItem, features: Features) -> Tensor:
        scored = self.family.score_tensor(features) if self.engine_score else features[0]
        scored = scored.float() if self.float32_score else scored
        item = planned.item
        return evs.select_tokens(scored.view(item.num_units, item.tokens_per_unit, -1), planned.pruning_rate)

    def _encode(self, media: Media, training: bool) -> tuple[dict[Kind, list[Features]], list[tuple[Kind, Features]]]:
        """Encode all media; also run the tower on blanks as often as `_num_calls` asks, of which nothing is kept."""
        encoded: dict[Kind, list[Features]] = {"image": [], "video": []}
        blanks: list[tuple[Kind, Features]] = []
        calls = {kind: self.family.num_encoder_calls(media, kind) for kind in KINDS}
        wanted = self._num_calls(calls) if training else calls
        for kind in KINDS:
            if calls[kind]:
                encoded[kind] = self.family.encode(self.model, media, kind)
            for _ in range(wanted[kind] - calls[kind]):
                device = next(self.model.parameters()).device
                blank = _to_device(self.family.blank(kind), device)
                # A slice of length 0 adds no token, and its backward gives the tower exact zeros.
                blanks += [(kind, [layer[:0] for layer in one]) for one in self.family.encode(self.model, blank, kind)]
        return encoded, blanks

    def _num_calls(self, calls: dict[Kind, int]) -> dict[Kind, int]:
        wanted = dict(calls)
        if self.equal_calls:
            counts = torch.tensor([calls[kind] for kind in KINDS], device=next(self.model.parameters()).device)
            torch.distributed.all_reduce(counts, op=torch.distributed.ReduceOp.MAX)
            wanted = dict(zip(KINDS, counts.tolist(), strict=True))
        if self.encoder_trains:
            if not self.family.shares_encoder:
                wanted = {kind: max(1, count) for kind, count in wanted.items()}
            elif not any(wanted.values()):
                wanted["video"] = 1
        return wanted


def _to_device(media: Media, device: torch.device) -> Media:
    return {
        name: value.to(device) if isinstance(value, Tensor) else [tensor.to(device) for tensor in value]
        for name, value in media.items()
    }
