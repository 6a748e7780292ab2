"""How many tokens every row has, before and after pruning, without decoding: what `schedule.py` builds batches from.

A row is made into ids and labels by the code that training uses, from blank frames of the size, number and times that
the index has (`rows.RowReader.blank`). So its lengths, and what is refused, are those of training. A row that is too
long for a batch is also measured with fewer of its frames.

Cost: a medium that the index does not know is decoded twice (end to end, and the frames that are sampled); a row costs
one run of the model's processor on blank frames; both in parallel. `RowCache` keeps the lengths in a file beside the
index, so that all this is done once: by `evs-train check`, or by the first run that needs it. A wrong entry cannot do
harm: training compares each row with it (`batches.py`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow

from evs_train.data.chat import Example
from evs_train.data.index import (
    Facts,
    Fault,
    Kind,
    MediaIndex,
    damaged,
    key_of,
    read_table,
    replace_table,
    state_of,
)
from evs_train.data.manifest import Sample
from evs_train.data.probe import parallel, probe_all, unknown
from evs_train.data.rows import RowReader
from evs_train.data.sources import Source, name_of
from evs_train.data.template import IGNORE_INDEX
from evs_train.errors import DataError, Reason
from evs_train.pruners.base import Pruner
from evs_train.pruners.evs import EVS
from evs_train.redaction import redact, restore

SHARE_STEP = 0.75
"""Each level of a row has this share of the frames of the one before."""
_SAVE_SECONDS = 60.0

Progress = Callable[[str, int, Iterable[Any]], Iterable[Any]]
"""(what is done, how often, iterable) -> the iterable, watched."""


def unwatched(what: str, total: int, items: Iterable[Any]) -> Iterable[Any]:
    """No progress is shown."""
    return items


@dataclass(frozen=True)
class Length:
    """Tokens of a row, unpruned. `num_units` and `tokens_per_unit` have a number for each video."""

    num_tokens: int
    num_supervised: int
    num_image_tokens: int
    num_units: tuple[int, ...]
    tokens_per_unit: tuple[int, ...]

    @classmethod
    def of(cls, example: Example) -> Self:
        """The length of an example."""
        videos = [item for item in example.items if item.kind == "video"]
        return cls(
            len(example.input_ids),
            int((example.labels != IGNORE_INDEX).sum()),
            sum(item.num_tokens for item in example.items if item.kind == "image"),
            tuple(video.num_units for video in videos),
            tuple(video.tokens_per_unit for video in videos),
        )

    @property
    def num_video_tokens(self) -> int:
        return sum(units * tokens for units, tokens in zip(self.num_units, self.tokens_per_unit, strict=True))

    @property
    def num_media_tokens(self) -> int:
        """Tokens that the vision encoder makes, before pruning."""
        return self.num_video_tokens + self.num_image_tokens

    def retained_video_tokens(self, rate_of: Callable[[int], float], pruner: Pruner = EVS) -> int:
        """Video tokens after pruning; `rate_of` gives the rate of a video of so many units."""
        return sum(
            pruner.num_retained(units, tokens, rate_of(units))
            for units, tokens in zip(self.num_units, self.tokens_per_unit, strict=True)
        )

    def retained_tokens(self, rate_of: Callable[[int], float], pruner: Pruner = EVS) -> int:
        """All tokens after pruning."""
        return self.num_tokens - self.num_video_tokens + self.retained_video_tokens(rate_of, pruner)


@dataclass(frozen=True)
class PlannedRow:
    """One row as training would see it.

    Attributes:
        row: data file and row, for people.
        levels: its length with all sampled frames, and with `SHARE_STEP` of them, that share of those, and so on.
        is_whole: there is no further level, because no frames are left to lose.
    """

    sample_id: str
    row: str
    levels: tuple[Length, ...]
    is_whole: bool

    @property
    def full(self) -> Length:
        return self.levels[0]


@dataclass(frozen=True)
class Refused:
    """One row that training would put into quarantine. `file`: the medium to blame, or None if the row is."""

    sample_id: str
    row: str
    file: str | None
    reason: Reason
    message: str
    hint: str


Known = Mapping[Source, Facts | Fault]


def share_of(level: int) -> float:
    """Share of the sampled frames that a level of a row shows."""
    share: float = SHARE_STEP**level
    return share


def plan_row(reader: RowReader, sample: Sample, known: Known, longest: int | None = None) -> PlannedRow | Refused:
    """One row as training would see it, given what is `known` of its media.

    `longest`: levels are added until one has no more tokens than this, unpruned, or there are no frames to lose.
    """
    facts: list[Facts] = []
    for source in (*sample.videos, *sample.images):
        verdict = known[source]
        if isinstance(verdict, Fault):
            return Refused(sample.id, sample.source, name_of(source), verdict.reason, verdict.message, verdict.hint)
        facts.append(verdict)
    counts = [len(one.indices) for one in facts[: len(sample.videos)]]
    fewest = [min(count, reader.sampling.min_frames) for count in counts]
    levels: list[Length] = []
    is_whole = False
    while not is_whole and (not levels or (longest is not None and levels[-1].num_tokens > longest)):
        share = share_of(len(levels))
        try:
            levels.append(Length.of(reader.blank(sample, facts, share=share)))
        except DataError as error:
            return Refused(sample.id, sample.source, None, error.reason, error.message, error.hint)
        is_whole = all(int(count * share) <= least for count, least in zip(counts, fewest, strict=True))
    return PlannedRow(sample.id, sample.source, tuple(levels), is_whole)


@dataclass(frozen=True)
class Probed:
    """What is `known` of media.

    Attributes:
        backends: how many videos are decoded by each of decord, pyav and images.
        num_read: media that were read now.
        place: where the index is, or why it was not saved.
    """

    known: Known
    backends: dict[str, int]
    num_read: int
    place: str


def probe_media(
    reader: RowReader, samples: Iterable[Sample], path: Path, num_workers: int, watched: Progress = unwatched
) -> Probed:
    """Bring the index at `path` up to date with the media of these rows, and save it."""
    wanted: list[tuple[Kind, Source]] = []
    for sample in samples:
        wanted += [("video", video) for video in sample.videos]
        wanted += [("image", image) for image in sample.images]
    wanted = list(dict.fromkeys(wanted))
    index = MediaIndex.read(path, facts=True)
    todo = unknown(index, wanted, reader.sampling)
    passing: dict[Source, Fault] = {}
    num_read, last_saved, place = 0, time.monotonic(), str(path)

    def save() -> str:
        try:
            index.write(path)
        except OSError as error:
            return f"not saved: {path}: {error.strerror} (set data.index to a file that can be written)"
        return str(path)

    try:
        probes = probe_all(index, todo, reader.sampling, num_workers, reader.decoding)
        for source, error in watched("media", len(todo), probes) if todo else ():
            num_read += 1
            if error is not None:
                passing[source] = Fault(error.message, error.hint, error.reason)
            if time.monotonic() - last_saved > _SAVE_SECONDS:
                place, last_saved = save(), time.monotonic()
    finally:  # one that is interrupted goes on from here the next time
        if num_read:
            place = save()
    known: dict[Source, Facts | Fault] = dict(passing)
    for _, source in wanted:
        if source not in known:
            entry = index.find(source)
            changed = Fault(f"{name_of(source)}: changed while it was read", "check again", "missing")
            known[source] = (entry and (entry.facts or entry.fault)) or changed
    entries = [index.entries.get(key_of(source)) for kind, source in wanted if kind == "video"]
    backends = Counter(entry.backend for entry in entries if entry is not None and entry.backend is not None)
    return Probed(known, dict(backends.most_common()), num_read, place)


class RowCache:
    """Lengths of rows in a file, by what they depend on: the row's text, the state of its media, and how it is read."""

    def __init__(self, path: Path, reader: RowReader) -> None:
        """Raises DataError when the file cannot be read."""
        self.path = path
        self._settings = _settings(reader)
        self._rows: dict[str, str] = {}
        table = read_table(path)
        if table is None:
            return
        if table.column_names != ["key", "row"]:
            raise damaged(path, "its columns are others")
        self._rows = dict(zip(table["key"].to_pylist(), table["row"].to_pylist(), strict=True))

    def key(self, sample: Sample) -> str:
        """What the lengths of a row depend on, hashed."""
        media = [[key_of(source), state_of(source)] for source in (*sample.videos, *sample.images)]
        text = json.dumps([self._settings, sample.id, sample.source, sample.messages, media], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def find(self, key: str, longest: int | None = None) -> PlannedRow | None:
        """The row of this key, if all levels are known that `plan_row` would give it. Raises DataError."""
        if key not in self._rows:
            return None
        text = self._rows[key]
        try:
            sample_id, row, is_whole, *levels = json.loads(text)
            found = [
                Length(num_tokens, num_supervised, num_image_tokens, tuple(units), tuple(tokens))
                for num_tokens, num_supervised, num_image_tokens, units, tokens in levels
            ]
        except (ValueError, TypeError) as error:
            raise damaged(self.path, error) from error
        if longest is not None and not is_whole and found[-1].num_tokens > longest:
            return None
        return PlannedRow(sample_id, restore(row), tuple(found), is_whole)

    def add(self, key: str, row: PlannedRow) -> None:
        """Keep a row."""
        levels = [
            [one.num_tokens, one.num_supervised, one.num_image_tokens, one.num_units, one.tokens_per_unit]
            for one in row.levels
        ]
        self._rows[key] = json.dumps([row.sample_id, redact(row.row), row.is_whole, *levels])

    def write(self) -> None:
        """Replace the file. Raises OSError."""
        replace_table(self.path, pyarrow.table({"key": list(self._rows), "row": list(self._rows.values())}))


def plan_rows(
    reader: RowReader,
    index: Path,
    longest: int | None,
    *,
    num_workers: int,
    watched: Progress = unwatched,
    probed: Probed | None = None,
) -> list[PlannedRow | Refused]:
    """All rows as training would see them; what is not in the cache beside `index` is measured, and kept there.

    Args:
        longest: see `plan_row`.
        probed: what is known of all media; None: probe those of the rows that must be measured.
    """
    cache = RowCache(index.with_suffix(".rows.arrow"), reader)
    keys = [cache.key(sample) for sample in reader.samples]
    rows: list[PlannedRow | Refused | None] = [cache.find(key, longest) for key in keys]
    missing = [number for number, row in enumerate(rows) if row is None]
    if missing:
        samples = [reader.samples[number] for number in missing]
        known = (probed or probe_media(reader, samples, index, num_workers, watched)).known
        measured = parallel(lambda sample: plan_row(reader, sample, known, longest), samples, num_workers)
        for place, row in watched("rows", len(samples), measured):
            rows[missing[place]] = row
            if isinstance(row, PlannedRow):
                cache.add(keys[missing[place]], row)
        try:
            cache.write()
        except OSError:  # a folder that cannot be written costs time, and nothing else
            return [row for row in rows if row is not None]
    return [row for row in rows if row is not None]


def _settings(reader: RowReader) -> str:
    """Hash of everything that makes a row's length beside the row."""
    plain = [reader.sampling, sorted(reader.template_kwargs.items()), reader.max_length, reader.last_only]
    versions = [importlib.metadata.version(name) for name in ("evs-train", "transformers")]
    return hashlib.sha256(repr([reader.encoder.fingerprint(), plain, versions]).encode()).hexdigest()
