"""Group `alternatives`: what one would write instead of a planned pruning, on the same batch, with the same model.

Minimal versions of our own of each idea, as hooks that take the place of ours (`device_half.py`):

| way | how tokens leave the batch |
|---|---|
| `evs_train` | counts planned on the host; a sort and a gather |
| `boolean mask` | EVS's choice as a mask, by which everything is indexed; rows of any length are then padded |
| `masked, not dropped` | EVS's choice hidden from attention; the sequence stays as long as it is |
| `scan by unit` | unit after unit, a token stays if it differs enough from the last one kept at its place |
| `scan by token` | unit after unit, a share of each is dropped; whether a token is a video's is asked token by token |

Where the ideas are from: `boolean mask` from transformers' `nemotron_h_omni` (read: `inputs_embeds[retention_mask]`),
which does it for one row and without labels. `scan by token` from TimeChat-Online's training code (read: yaolinli/
TimeChat-Online, `train/transformers-replace-code`: a loop over frames, `idx.item()` for each token, a comparison with
the frame before, a mask at the end; rows of one batch must come out equally long there). `scan by unit` is what that
becomes if the comparison is with the last kept token, so that units cannot be compared all at once.

How many tokens the scans keep depends on what is shown. `scan by unit` is given the threshold with which it keeps about
as many as EVS, found before anything is timed. *pruning*, *waits* and *launched* are as in `pruning`; *relative* is the
step over that of `evs_train` in the same round.
Not for families that have one placeholder for images and videos.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from benchmarks.perf.device_half import Way, measure
from benchmarks.perf.harness import Bench, Column, Group, Row, Size, ratio
from benchmarks.perf.pruning import figures
from benchmarks.perf.runs import Plan, Step, Workload
from benchmarks.perf.shapes import CPU, QWEN_2B, TOY, qwen3_vl_8b
from evs_train.collate import PlannedItem
from evs_train.data.template import IGNORE_INDEX
from evs_train.models.base import Encoding, Features
from evs_train.prune import EvsHook

RATE = 0.75


class BooleanMask(EvsHook):
    """EVS's choice as a mask: index everything by it, row by row, and pad what is left."""

    def _pruned(self, batch: dict[str, Any], encoding: Encoding, others: dict[str, Any]) -> dict[str, Any]:
        plan, (encoded, blanks) = batch["plan"], encoding
        with self.autocast():
            masks = self.masks(batch, encoded["video"])
            inputs, videos = self.keep(batch, masks, encoded["video"])
            remaining = {"image": iter(encoded["image"]), "video": iter(videos)}
            features = [(planned.item.kind, next(remaining[planned.item.kind])) for planned in plan.items]
            return self.family.forward_inputs(self.model, {**others, **inputs}, features + blanks)

    def masks(self, batch: dict[str, Any], videos: Sequence[Features]) -> list[Tensor]:
        """For each video a (T * N,) bool mask of the tokens that stay."""
        return [self.mask(planned, features) for planned, features in zip(batch["plan"].videos, videos, strict=True)]

    def mask(self, planned: PlannedItem, features: Features) -> Tensor:
        """EVS's choice of one video."""
        mask = torch.zeros(planned.item.num_tokens, dtype=torch.bool, device=features[0].device)
        return mask.index_fill(0, self._choose(planned, features).index, value=True)

    def keep(
        self, batch: dict[str, Any], masks: Sequence[Tensor], videos: Sequence[Features]
    ) -> tuple[dict[str, Any], list[Features]]:
        """Ids, labels, attention mask and positions of the forward, and the features of the videos."""
        ids: Tensor = batch["input_ids"]
        stays = is_real(batch).bool()
        stays[ids == self.family.config.video_token_id] = torch.cat(list(masks))
        kept = [ids[row][stays[row]] for row in range(len(ids))]
        labels = [batch["labels"][row][stays[row]] for row in range(len(ids))]
        positions = [batch["position_ids"][:, row][:, stays[row]].T for row in range(len(ids))]  # (L', P)
        inputs = {
            "input_ids": pad_sequence(kept, batch_first=True, padding_value=self.family.pad_token_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in kept], batch_first=True),
            "position_ids": pad_sequence(positions, batch_first=True).permute(2, 0, 1),  # (P, B, L')
        }
        features = [[layer[mask] for layer in of_video] for mask, of_video in zip(masks, videos, strict=True)]
        return inputs, features


class NotDropped(BooleanMask):
    """Hide pruned tokens from attention, and compute them all the same."""

    def keep(
        self, batch: dict[str, Any], masks: Sequence[Tensor], videos: Sequence[Features]
    ) -> tuple[dict[str, Any], list[Features]]:
        real = is_real(batch)
        seen = real.flatten().index_copy(0, batch["index"]["video"], torch.cat(list(masks)).long()).view_as(real)
        inputs = {name: batch[name] for name in ("input_ids", "labels", "position_ids")}
        return inputs | {"attention_mask": seen}, list(videos)


class ScanByUnit(BooleanMask):
    """Compare each token with the last one kept at its place, unit after unit.

    Attributes:
        thresholds: of a video of so many units at a rate; found when it is first met, which is before it is timed.
    """

    thresholds: ClassVar[dict[tuple[int, float], float]] = {}

    def mask(self, planned: PlannedItem, features: Features) -> Tensor:
        scored = self.scored(planned.item, features).detach()
        key = (planned.item.num_units, planned.pruning_rate)
        if key not in self.thresholds:
            self.thresholds[key] = threshold_for(scored, planned.num_retained)
        return scan(scored, self.thresholds[key]).flatten()


class ScanByToken(BooleanMask):
    """Look for each unit's tokens one by one, and drop the same share of every unit but the first."""

    def masks(self, batch: dict[str, Any], videos: Sequence[Features]) -> list[Tensor]:
        plan, places = batch["plan"], batch["index"]["video"]
        of_videos = set(places.tolist())
        units = iter(places.split([p.item.tokens_per_unit for p in plan.videos for _ in range(p.item.num_units)]))
        found = []
        for planned, features in zip(plan.videos, videos, strict=True):
            scored = self.scored(planned.item, features).detach()
            share = drop_share(planned)
            mask = torch.ones_like(scored[..., 0], dtype=torch.bool)  # (T, N)
            for number in range(planned.item.num_units):
                members = [place for place in next(units) if place.item() in of_videos]
                if number:
                    alike = F.cosine_similarity(scored[number], scored[number - 1], dim=-1)  # (N,)
                    mask[number, alike.topk(int(len(members) * share)).indices] = False
            found.append(mask.flatten())
        return found


def drop_share(planned: PlannedItem) -> float:
    """Share of each unit but the first that must go, for a video to keep about as many tokens as planned."""
    item = planned.item
    return (item.num_tokens - planned.num_retained) / max(item.num_tokens - item.tokens_per_unit, 1)


def scan(embeds: Tensor, threshold: float) -> Tensor:
    """(T, N) bool: tokens whose `1 - cosine` to the last one kept at their place is above the threshold; (T, N, D)."""
    last = embeds[0]
    kept = [torch.ones_like(last[:, 0], dtype=torch.bool)]
    for unit in embeds[1:]:
        differs = 1 - F.cosine_similarity(unit, last, dim=-1) > threshold  # (N,)
        last = torch.where(differs[:, None], unit, last)
        kept.append(differs)
    return torch.stack(kept)


def threshold_for(embeds: Tensor, num_retained: int) -> float:
    """The threshold with which the scan keeps about so many tokens, by bisection."""
    low, high = -0.01, 2.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if int(scan(embeds, middle).sum()) > num_retained else (low, middle)
    return high


WAYS: dict[str, type[EvsHook]] = {
    "evs_train": EvsHook,
    "boolean mask": BooleanMask,
    "masked, not dropped": NotDropped,
    "scan by unit": ScanByUnit,
    "scan by token": ScanByToken,
}


def is_real(batch: dict[str, Any]) -> Tensor:
    """(B, L) int64: 1 at the tokens of the unpruned batch, 0 where there is padding."""
    index = batch["index"]
    real = torch.zeros_like(batch["input_ids"]).flatten()
    return real.index_fill(0, torch.cat([index["always"], index["video"]]), 1).view_as(batch["input_ids"])


PLANS: dict[Size, Plan] = {
    "toy": Plan((Workload(TOY, "full"),), (12, 8), 1),
    "cpu": Plan((Workload(CPU, "full"),), (24, 16), 3),
    "gpu": Plan((Workload(QWEN_2B, "full"), Workload(qwen3_vl_8b(), "lora", checkpointing=True)), (128, 96), 10),
}


def run(bench: Bench) -> list[Row]:
    """A row for each model and way."""
    plan = PLANS[bench.size]
    rows = []
    for work in plan.works:
        bench.say(f"alternatives: {work.shape.name}")
        ScanByUnit.thresholds.clear()
        found = measure(work, [Way(Step(plan.frames, RATE), hook) for hook in WAYS.values()], plan.rounds, bench)
        ours = found[0]
        for name, one in zip(WAYS, found, strict=True):
            relative = ratio(one.seconds, ours.seconds)
            rows.append({"model": work.shape.name, "way": name, **figures(one), "relative": relative})
    return rows


COLUMNS = (
    Column("model", "model"),
    Column("way", "way"),
    Column("kept", "kept", ","),
    Column("computed", "computed", ","),
    Column("seconds", "step, s", ".3f"),
    Column("relative", "relative", ".2f"),
    Column("pruning_ms", "pruning, ms", ".2f"),
    Column("launched", "launched"),
    Column("waits", "waits"),
)


def draw(axes: Any, rows: Sequence[Row]) -> None:
    """Steps as bars, a group for each model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    for place, model in enumerate(models):
        of_model = [row for row in rows if row["model"] == model]
        heights = [row["relative"]["median"] for row in of_model]
        lefts = [number + 0.8 * place / len(models) for number in range(len(of_model))]
        axes.bar(lefts, heights, 0.8 / len(models), label=model, align="edge")
        axes.set_xticks([number + 0.4 for number in range(len(of_model))], [row["way"] for row in of_model])
    axes.tick_params(axis="x", labelrotation=20, labelsize=6)
    axes.set_ylabel("step, over ours")
    axes.legend(fontsize=6)


GROUP = Group(f"other ways to prune the same batch, at rate {RATE}", run, COLUMNS, draw)
