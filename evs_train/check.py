"""What a recipe's data are, before anything is trained: every medium read, every row planned, no weights and no GPU.

Media are probed in parallel into the index (`data/index.py`), which training then uses. Each row is made into ids and
labels by the code that training uses, from black frames of the true size, number and times. So its tokens, and what is
refused, are those of training, and only the pixels differ.

Cost: each medium that the index does not know is decoded twice (end to end, and the frames that are sampled), and each
row costs one run of the model's processor; both on all cores. Memory is one row's frames for each core.
This module does not print (`check_console.py`), and does not judge what the text says or the pictures show.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Any

from PIL import Image

from evs_train import evs
from evs_train.data.chat import Example, MediaItem, build_example
from evs_train.data.index import (
    Facts,
    Fault,
    Kind,
    MediaIndex,
    index_file,
    key_of,
    num_cores,
    parallel,
    probe_all,
    unknown,
)
from evs_train.data.manifest import Sample
from evs_train.data.sources import Source, name_of
from evs_train.data.template import IGNORE_INDEX
from evs_train.errors import DataError
from evs_train.memory import MemoryEstimate, estimate_memory
from evs_train.models.tuning import PartSize, part_sizes
from evs_train.samplers import cap_rate
from evs_train.uptrain import Run, deepspeed_file

RATES = (0.0, 0.5, 0.75, 0.9)
PERCENTILES = (5, 50, 95, 100)
NUM_LONGEST = 5
_SAVE_SECONDS = 60.0

Progress = Callable[[str, int, Iterable[Any]], Iterable[Any]]
"""(what is done, how often, iterable) -> the iterable, watched."""


@dataclass(frozen=True)
class PlannedRow:
    """One row as training would see it, unpruned. `num_units` and `tokens_per_unit` have a number for each video."""

    sample_id: str
    row: str
    num_tokens: int
    num_supervised: int
    num_units: tuple[int, ...]
    tokens_per_unit: tuple[int, ...]

    def retained(self, rate: float, *, cap: bool) -> int:
        """Video tokens that are left at a fixed `evs.rate`."""
        return sum(
            evs.retained_tokens(units, tokens, cap_rate(rate, units) if cap else rate)
            for units, tokens in zip(self.num_units, self.tokens_per_unit, strict=True)
        )


@dataclass(frozen=True)
class Refused:
    """One row that training would put into quarantine. `file`: the medium to blame, or None if the row is."""

    sample_id: str
    row: str
    file: str | None
    reason: str
    message: str
    hint: str


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
    global_batch: int
    index: str
    backends: dict[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """A mapping for `json.dumps`."""
        values = asdict(self)
        values["memory"]["total"] = self.memory.total
        values["refused_by_reason"] = dict(Counter(one.reason for one in self.refused))
        return values


def check(run: Run, watched: Progress, num_workers: int | None = None) -> Report:
    """Read all media, plan all rows, and sum up."""
    workers = num_cores() if num_workers is None else num_workers
    index = MediaIndex.read(index_file(run.recipe.data), facts=True)
    media: list[tuple[Kind, Source]] = [("video", video) for sample in run.samples for video in sample.videos]
    media += [("image", image) for sample in run.samples for image in sample.images]
    media = list(dict.fromkeys(media))
    passing, num_read, place = _probe(run, index, media, watched, workers)
    known: dict[Source, Facts | Fault] = dict(passing)
    for _, source in media:
        entry = index.find(source) if source not in known else None
        verdict = entry and (entry.facts or entry.fault)
        if source not in known:
            known[source] = verdict or Fault(f"{name_of(source)}: changed while it was read", "check again", "missing")
    found: list[PlannedRow | Refused | None] = [None] * len(run.samples)
    rows = parallel(lambda sample: plan_row(run, sample, known), run.samples, workers)
    for number, row in watched("rows", len(run.samples), rows):
        found[number] = row
    planned = [row for row in found if isinstance(row, PlannedRow)]
    refused = [row for row in found if isinstance(row, Refused)]
    entries = [index.entries.get(key_of(source)) for kind, source in media if kind == "video"]
    backends = Counter(entry.backend for entry in entries if entry is not None and entry.backend is not None)
    report = _report(run, known, planned, refused, num_read=num_read, place=place)
    return replace(report, backends=dict(backends.most_common()))


def plan_row(run: Run, sample: Sample, known: Mapping[Source, Facts | Fault]) -> PlannedRow | Refused:
    """One row as training would see it, given what is `known` of its media."""
    facts: list[Facts] = []
    for source in (*sample.videos, *sample.images):
        verdict = known[source]
        if isinstance(verdict, Fault):
            return Refused(sample.id, sample.source, name_of(source), verdict.reason, verdict.message, verdict.hint)
        facts.append(verdict)
    try:
        example = blank_example(run, sample, facts)
    except DataError as error:
        return Refused(sample.id, sample.source, None, error.reason, error.message, error.hint)
    videos = [item for item in example.items if item.kind == "video"]
    return PlannedRow(
        sample.id,
        sample.source,
        len(example.input_ids),
        int((example.labels != IGNORE_INDEX).sum()),
        tuple(video.num_units for video in videos),
        tuple(video.tokens_per_unit for video in videos),
    )


def blank_example(run: Run, sample: Sample, facts: Sequence[Facts]) -> Example:
    """The example of a row from black media; `facts` of its videos, then of its images. Raises DataError."""
    videos, images = facts[: len(sample.videos)], facts[len(sample.videos) :]
    return build_example(
        sample,
        [one.blank_clip(name_of(source)) for one, source in zip(videos, sample.videos, strict=True)],
        [Image.new("RGB", (one.width, one.height)) for one in images],
        run.family,
        draw=0,
        template_kwargs=run.stream.template_kwargs,
        max_length=run.stream.max_length,
        last_only=run.stream.last_only,
    )


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


def _probe(
    run: Run, index: MediaIndex, media: Sequence[tuple[Kind, Source]], watched: Progress, workers: int
) -> tuple[dict[Source, Fault], int, str]:
    """Bring the index up to date and save it; faults that may pass, number of media read, where the index is."""
    path = index_file(run.recipe.data)
    todo = unknown(index, media, run.stream.sampling)
    probes, num_read, last_saved = (
        probe_all(index, todo, run.stream.sampling, workers, run.stream.decoding),
        0,
        time.monotonic(),
    )
    passing: dict[Source, Fault] = {}
    place = str(path)

    def save() -> str:
        try:
            index.write(path)
        except OSError as error:
            return f"not saved: {path}: {error.strerror} (set data.index to a file that can be written)"
        return str(path)

    try:
        for source, error in watched("media", len(todo), probes):
            num_read += 1
            if error is not None:
                passing[source] = Fault(error.message, error.hint, error.reason)
            if time.monotonic() - last_saved > _SAVE_SECONDS:
                place, last_saved = save(), time.monotonic()
    finally:  # a check that is interrupted goes on from here the next time
        if num_read:
            place = save()
    return passing, num_read, place


def _report(
    run: Run,
    known: Mapping[Source, Facts | Fault],
    planned: Sequence[PlannedRow],
    refused: list[Refused],
    *,
    num_read: int,
    place: str,
) -> Report:
    recipe, samples = run.recipe, run.samples
    videos = [one for one in known.values() if isinstance(one, Facts) and one.kind == "video"]
    by_pixels = sorted(([one.width, one.height] for one in videos), key=lambda size: size[0] * size[1])
    seconds = sorted(one.duration for one in videos)
    lengths = sorted(row.num_tokens for row in planned)
    longest = sorted(planned, key=lambda row: -row.num_tokens)[:NUM_LONGEST]
    model = run.planned_model()
    batch = sum(lengths[-recipe.train.batch_size :])
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
            "media_read": num_read,
        },
        seconds={"total": sum(seconds), **_percentiles(seconds)} if seconds else {},
        resolutions=_percentiles(by_pixels),
        row_tokens=_percentiles(lengths),
        tokens={f"{rate:g}": _tokens(planned, rate, cap=recipe.evs.cap) for rate in RATES},
        longest=[(row.sample_id, row.num_tokens) for row in longest],
        refused=refused,
        supervised_share=sum(row.num_supervised for row in planned) / max(sum(lengths), 1),
        labels=_labels(run, known, planned),
        parts=part_sizes(model, run.family),
        memory=estimate_memory(
            model,
            run.family,
            recipe,
            None if file is None else json.loads(file.read_text(encoding="utf-8")),
            num_tokens=batch,
            num_processes=run.world_size,
        ),
        num_steps=run.num_steps,
        global_batch=run.global_batch,
        index=place,
    )


def _tokens(planned: Sequence[PlannedRow], rate: float, *, cap: bool) -> dict[str, int]:
    video = sum(row.retained(rate, cap=cap) for row in planned)
    dense = sum(row.retained(0.0, cap=False) for row in planned)
    return {"video_tokens": video, "all_tokens": sum(row.num_tokens for row in planned) - dense + video}


def _labels(run: Run, known: Mapping[Source, Facts | Fault], planned: Sequence[PlannedRow]) -> list[tuple[str, bool]]:
    """`labelled_text` of the first row that is not refused, with a video if there is one."""
    row = next((row for row in planned if row.num_units), planned[0] if planned else None)
    if row is None:
        return []
    sample = next(sample for sample in run.samples if sample.source == row.row)
    facts = [one for one in (known[source] for source in (*sample.videos, *sample.images)) if isinstance(one, Facts)]
    return labelled_text(run.family.processor.tokenizer, blank_example(run, sample, facts))


def _percentiles(ranked: Sequence[Any]) -> dict[str, Any]:
    """The smallest value that at least p % of the ranked values do not exceed, for each p of `PERCENTILES`."""
    return {str(p): ranked[math.ceil(p / 100 * len(ranked)) - 1] for p in PERCENTILES} if ranked else {}
