"""What a recipe's data are, before anything is trained: every medium read, every row planned, no weights and no GPU.

Media are probed in parallel into the index (`data/index.py`), which training then uses. Each row is made into ids and
labels by the code that training uses, from frames of the true size, number and times that have no pixels. So its
tokens, and what is refused, are those of training.

Cost: each medium that the index does not know is decoded twice (end to end, and the frames that are sampled), and each
row costs one run of the model's processor; both on all cores. Memory is one row's frames for each core.
This module does not print (`check_console.py`), and does not judge what the text says or the pictures show.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from evs_train.data.budget import BudgetBatches, Usage
from evs_train.data.chat import Example, MediaItem
from evs_train.data.index import Facts, Kind, index_file, key_of
from evs_train.data.lengths import Known, PlannedRow, Probed, Refused, probe_media
from evs_train.data.probe import num_cores
from evs_train.data.template import IGNORE_INDEX
from evs_train.inputs import Inputs, deepspeed_file
from evs_train.memory import MemoryEstimate, estimate_memory
from evs_train.models.tuning import PartSize, part_sizes
from evs_train.pruners.base import Pruner
from evs_train.rates import Rates
from evs_train.samplers import Fixed

RATES = (0.0, 0.5, 0.75, 0.9)
PERCENTILES = (5, 50, 95, 100)
NUM_LONGEST = 5
_SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Report:
    """All that was found. Percentiles are by `PERCENTILES`, absent where there is nothing to rank.

    Attributes:
        counts: rows in all and by what they hold, distinct videos and images, media that were read now.
        seconds: length of the distinct videos: `total` and percentiles.
        resolutions: of the distinct videos, by number of pixels: percentile to [width, height].
        row_tokens: unpruned tokens of a row.
        tokens: for each of `RATES`, as `evs.rate`: video tokens and all tokens of all rows, once each.
        longest: ids and unpruned tokens of the longest rows.
        backends: videos by what decodes them: decord, pyav or images; the index says which for each file.
        step, rows_per_step: what an optimizer step is, and how many rows it reads on average.
        usage: how micro-batches with a budget of tokens are used.
        feature_cache_gib: what `data.cache_features` would take on disk, at most, for every medium with all of its
            frames; None where the vision tower is trained.
        labels: a row's text in pieces, each with whether it is trained on; media are one piece.
    """

    counts: dict[str, int]
    seconds: dict[str, float]
    resolutions: dict[str, list[int]]
    row_tokens: dict[str, float]
    tokens: dict[str, dict[str, int]]
    longest: list[tuple[str, int]]
    refused: list[Refused]
    supervised_share: float
    labels: list[tuple[str, bool]]
    parts: list[PartSize]
    memory: MemoryEstimate
    num_steps: int
    step: str
    rows_per_step: float
    usage: Usage | None
    index: str
    backends: dict[str, int]
    feature_cache_gib: float | None

    def as_json(self) -> dict[str, Any]:
        """A mapping for `json.dumps`."""
        values = asdict(self)
        values["memory"]["total"] = self.memory.total
        values["refused_by_reason"] = dict(Counter(one.reason for one in self.refused))
        return values


def check(run: Inputs, num_workers: int | None = None) -> Report:
    """Read all media, plan all rows, and sum up."""
    workers = num_cores() if num_workers is None else num_workers
    probed = probe_media(run.reader, run.samples, index_file(run.recipe.data), workers, run.watched)
    rows = run.plan(workers, probed)
    return _report(run, probed, rows)


def labelled_text(tokenizer: Any, example: Example) -> list[tuple[str, bool]]:
    """The text of an example in pieces, and whether each is trained on; a medium's tokens are one piece."""
    of_medium: list[MediaItem | None] = [None] * len(example.input_ids)
    for item, span in zip(example.items, example.spans, strict=True):
        for place in span.tolist():
            of_medium[place] = item
    trained = (example.labels != IGNORE_INDEX).tolist()
    ids = example.input_ids.tolist()
    pieces = []
    for (item, is_trained), places in groupby(range(len(ids)), key=lambda place: (of_medium[place], trained[place])):
        piece = [ids[place] for place in places]
        pieces.append((tokenizer.decode(piece) if item is None else f"[{len(piece)} {item.kind} tokens]", is_trained))
    return pieces


def _report(run: Inputs, probed: Probed, rows: Sequence[PlannedRow | Refused]) -> Report:
    recipe, samples, known = run.recipe, run.samples, probed.known
    planned = [row for row in rows if isinstance(row, PlannedRow)]
    refused = [row for row in rows if isinstance(row, Refused)]
    schedule = run.schedule_of(rows)
    videos = [one for one in known.values() if isinstance(one, Facts) and one.kind == "video"]
    by_pixels = sorted(([one.width, one.height] for one in videos), key=lambda size: size[0] * size[1])
    seconds = sorted(one.duration for one in videos)
    lengths = sorted(row.full.num_tokens for row in planned)
    longest = sorted(planned, key=lambda row: -row.full.num_tokens)[:NUM_LONGEST]
    model = run.planned_model()
    usage = schedule.usage() if isinstance(schedule, BudgetBatches) else None
    batch = recipe.data.max_tokens_per_batch or sum(lengths[-recipe.train.batch_size :])
    supervised = sum(row.full.num_supervised for row in planned)
    if usage is None:
        trained_on = _of_largest(recipe.train.batch_size, (row.full.num_supervised for row in planned))
        video_tokens = _of_largest(recipe.train.batch_size, (row.full.num_video_tokens for row in planned))
        image_tokens = _of_largest(recipe.train.batch_size, (row.full.num_image_tokens for row in planned))
    else:
        trained_on = usage.most_supervised
        video_tokens, image_tokens = usage.most_video_tokens, usage.most_image_tokens
    num_passes = 1 + len(recipe.objective.further_passes)  # all their logits are held at once
    if recipe.objective.kind == "sandwich":  # and all else of them, the lowest rate's the longest
        batch *= num_passes
    file = None if recipe.deepspeed is None else deepspeed_file(recipe.deepspeed)
    return Report(
        counts={
            "rows": len(samples),
            "rows_with_video": sum(bool(sample.videos) for sample in samples),
            "rows_with_images_only": sum(bool(sample.images) and not sample.videos for sample in samples),
            "rows_of_text": sum(not sample.images and not sample.videos for sample in samples),
            "rows_refused": len(refused),
            "videos": len({video for sample in samples for video in sample.videos}),
            "images": len({image for sample in samples for image in sample.images}),
            "media_read": probed.num_read,
        },
        seconds={"total": sum(seconds), **_percentiles(seconds)} if seconds else {},
        resolutions=_percentiles(by_pixels),
        row_tokens=_percentiles(lengths),
        tokens={f"{rate:g}": _tokens(planned, rate, run.pruner, cap=recipe.evs.cap) for rate in RATES},
        longest=[(row.sample_id, row.full.num_tokens) for row in longest],
        refused=refused,
        supervised_share=supervised / max(sum(lengths), 1),
        labels=_labels(run, known, rows),
        parts=part_sizes(model, run.family),
        memory=estimate_memory(
            model,
            run.family,
            recipe,
            None if file is None else json.loads(file.read_text(encoding="utf-8")),
            num_tokens=batch,
            num_video_tokens=video_tokens,
            num_image_tokens=image_tokens,
            num_logits=num_passes * trained_on,
            num_processes=run.world_size,
        ),
        num_steps=schedule.num_steps,
        step=schedule.describe(),
        rows_per_step=schedule.draws_before(schedule.num_steps) / schedule.num_steps,
        usage=usage,
        index=probed.place,
        backends=probed.backends,
        feature_cache_gib=_feature_gib(run, rows),
    )


def _of_largest(num_rows: int, counts: Iterable[int]) -> int:
    """Sum of the `num_rows` largest."""
    return sum(sorted(counts)[-num_rows:])


def _feature_gib(run: Inputs, rows: Sequence[PlannedRow | Refused]) -> float | None:
    """GiB of what the tower, or a frozen projector behind it, says of all distinct media."""
    family, tuning = run.family, run.recipe.tuning
    if not family.projector_entries or tuning.trains_vision:
        return None
    tokens: dict[tuple[Kind, str], int] = {}
    for sample, row in zip(run.samples, rows, strict=True):
        if isinstance(row, PlannedRow):
            full = row.full
            for source, units, per_unit in zip(sample.videos, full.num_units, full.tokens_per_unit, strict=True):
                tokens["video", key_of(source)] = units * per_unit
            tokens["image", "|".join(map(key_of, sample.images))] = full.num_image_tokens
    # Where weights are kept in float32, so may be what autocast hands on from layer to layer.
    halves = run.recipe.model.dtype == "bfloat16" and (tuning.method == "lora" or run.recipe.deepspeed is not None)
    behind = None if tuning.trains_projector else family.feature_values()
    values = sum(count * (behind or family.tower_values(kind)) for (kind, _), count in tokens.items())
    return values * (2 if halves else 4) / 2**30


def _tokens(planned: Sequence[PlannedRow], rate: float, pruner: Pruner, *, cap: bool) -> dict[str, int]:
    rates = Rates(Fixed(rate), cap=cap)
    video = sum(row.full.retained_video_tokens(lambda units: rates.of_video(0, 0, units), pruner) for row in planned)
    dense = sum(row.full.num_video_tokens for row in planned)
    return {"video_tokens": video, "all_tokens": sum(row.full.num_tokens for row in planned) - dense + video}


def _labels(run: Inputs, known: Known, rows: Sequence[PlannedRow | Refused]) -> list[tuple[str, bool]]:
    """`labelled_text` of the first row that is not refused, with a video if there is one."""
    numbers = [number for number, row in enumerate(rows) if isinstance(row, PlannedRow)]
    if not numbers:
        return []
    sample = run.samples[next((number for number in numbers if run.samples[number].videos), numbers[0])]
    facts = [one for one in (known[source] for source in (*sample.videos, *sample.images)) if isinstance(one, Facts)]
    return labelled_text(run.family.processor.tokenizer, run.reader.blank(sample, facts))


def _percentiles(ranked: Sequence[Any]) -> dict[str, Any]:
    """The smallest value that at least p % of the ranked values do not exceed, for each p of `PERCENTILES`."""
    return {str(p): ranked[math.ceil(p / 100 * len(ranked)) - 1] for p in PERCENTILES} if ranked else {}
