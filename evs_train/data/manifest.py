"""Rows of data files to samples: who says what, and which media files belong to it.

`mixture.py` says which rows of which files are read, `readers.py` reads them, `formats.py` knows what they mean and
`media.py` finds their files; here they become samples, and every fault is told.

Invariant: in every `Sample` the media parts of its messages, in reading order, are exactly its `videos` and `images`,
and all these exist. Whatever breaks it is reported, all rows at once, before anything is trained.

Cost: every media file is looked up (not opened) once. Samples are held as bytes, about as long as their text, and
loader processes share them: no Python object of theirs is touched, whose reference count would copy the page.

Not here: decoding, templates and tokens, downloading, the order of rows, and judging what the text says.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from evs_train.data.formats import read_row
from evs_train.data.media import MediaFinder
from evs_train.data.mixture import Part, rows_per_epoch, sources
from evs_train.data.sources import FrameList, Source, TarMember, frame_files
from evs_train.data_config import DataSection
from evs_train.errors import DataError, EvsTrainError, MediaError

SHOWN_ROWS = 20

Problem = DataError | MediaError


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Args:
        id: the row's "id", or "<file name>:<row number>".
        source: the row for messages, as in "path/to/file.json row 12".
        messages: chat in Hugging Face form; `content` is always a list of {"type": "text", "text": ...},
            {"type": "video"} and {"type": "image"} in reading order.
        videos: one for each video part, in reading order.
        images: one for each image part, in reading order.
    """

    id: str
    source: str
    messages: tuple[dict[str, Any], ...]
    videos: tuple[Source, ...]
    images: tuple[str | TarMember, ...]


class Samples(Sequence[Sample]):
    """A list of samples that is kept as bytes; each is made anew when it is asked for (about 10 us)."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._ends = array("q", [0])

    def append(self, sample: Sample) -> None:
        self._bytes += pickle.dumps((sample.id, sample.source, sample.messages, sample.videos, sample.images))
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]  # also negative; IndexError beyond the end
        with memoryview(self._bytes) as view:
            return Sample(*pickle.loads(view[self._ends[place] : self._ends[place + 1]]))  # noqa: S301 (our own bytes)


@dataclass(frozen=True)
class TrainingData:
    """All rows of a run.

    Args:
        samples: the rows of all sources, one source after the other.
        parts: what was read of each source.
    """

    samples: Samples
    parts: tuple[Part, ...]

    @property
    def shares(self) -> tuple[tuple[int, int], ...]:
        """(rows, rows shown per epoch) of each source; empty without weights. See `batches.epoch_order`."""
        weighted = self.parts[0].source.weight is not None
        return tuple((part.num_rows, part.rows_per_epoch) for part in self.parts) if weighted else ()

    def describe(self) -> list[str]:
        """One line for each source: its rows, how they were read, and its share of an epoch."""
        return [part.describe() for part in self.parts]


def read_data(data: DataSection) -> TrainingData:
    """Read what a recipe's `data` section names.

    Raises:
        DataError: naming file and row (from 1; in JSONL the line, in a shard the key) of up to 20 of the bad rows, and
            how many there are; or a listing is wrong.
        MediaError: the same, when missing media files are all there is to report.
    """
    samples = Samples()
    problems: list[Problem] = []
    parts = [Part(source) for source in sources(data)]
    for part in parts:
        root = None if part.source.media_root is None else str(part.source.media_root)
        confined = root is not None and not data.allow_outside
        form, before = part.source.row_format, len(samples) + len(problems)
        try:
            for path, number, row in part.source.rows():
                finder = MediaFinder(root or str(path.parent), confined, part.source.frames_fps)
                try:
                    sample, name = _sample(row, f"{path.name}:{number}", f"{path} row {number}", finder, form)
                except (DataError, MediaError) as error:
                    problems.append(of_row(error, f"{path} row {number}"))
                else:
                    samples.append(sample)
                    part.num_rows += 1
                    part.formats[name] = part.formats.get(name, 0) + 1
        except DataError as error:
            problems.append(error)
        if len(samples) + len(problems) == before:
            hint = "take a larger share"
            problems.append(DataError(f"{part.source.name}: {part.source.strategy} takes no row", hint))
    if problems:
        raise all_faults(problems)
    _weigh(parts)
    return TrainingData(samples, tuple(parts))


def read_rows(paths: Sequence[str | Path], media_root: str | Path | None = None) -> Samples:
    """The rows of data files in any known format, in order. Raises as `read_data`."""
    root = None if media_root is None else str(media_root)
    return read_data(DataSection(rows=[str(path) for path in paths], media_root=root)).samples


def read_prompt(messages: Sequence[dict[str, Any]], media_root: str | Path = ".") -> Sample:
    """A conversation that waits for its answer, as a sample: OpenAI-style messages that name their media files.

    Raises:
        DataError, MediaError: as `read_rows`, or the last turn is not the user's.
    """
    finder = MediaFinder(str(media_root))
    return _sample({"messages": list(messages)}, "prompt:1", "the prompt", finder, prompt=True)[0]


def fingerprint(samples: Iterable[Sample], shares: Sequence[tuple[int, int]] = ()) -> str:
    """SHA-256 (hex) of what a run is trained on, independent of where it lies.

    Hashed is, for each sample in order, one line of JSON (ASCII, sorted keys, no spaces, ended by a newline): the list
    of id, messages, videos and images, where each media file stands as [file name without folders, size in bytes]; a
    member of a shard as [its name, size], a list of frames as the list of these, a folder of frames as [its name,
    number of frames, their bytes]. Then, with weights, one line of `shares`. So the order, any change of text, a media
    file of another name or size, and the weights change it; another folder, or a file whose content changed but not its
    size, does not.

    Raises:
        MediaError: a media file is gone.
    """
    digest = hashlib.sha256()
    for sample in samples:
        try:
            media = [[_identity(file) for file in kind] for kind in (sample.videos, sample.images)]
        except OSError as error:
            message = f"{sample.source}: {error.filename}: cannot be read: {error.strerror}"
            raise MediaError(message, reason="missing") from error
        line = json.dumps([sample.id, sample.messages, *media], sort_keys=True, separators=(",", ":"))
        digest.update(line.encode("ascii") + b"\n")
    if shares:
        digest.update(json.dumps(list(shares), separators=(",", ":")).encode("ascii") + b"\n")
    return digest.hexdigest()


def _identity(source: Source) -> list[Any]:
    if isinstance(source, TarMember):
        return [source.name, source.size]
    if isinstance(source, FrameList):
        return [_identity(path) for path in source.paths]
    if os.path.isdir(source):
        sizes = [os.path.getsize(path) for path in frame_files(source)]
        return [os.path.basename(source), len(sizes), sum(sizes)]
    return [os.path.basename(source), os.path.getsize(source)]


def _weigh(parts: list[Part]) -> None:
    """Set how many rows of each source an epoch shows."""
    sizes, weights = [part.num_rows for part in parts], [part.source.weight for part in parts]
    given = [weight for weight in weights if weight is not None]
    for part, count in zip(parts, rows_per_epoch(sizes, given) if given else sizes, strict=True):
        if count == 0:
            message = (
                f"{part.source.name}: weight {part.source.weight:g} is less than one row in an epoch of {sum(sizes)}"
            )
            raise DataError(message, "raise its weight, or leave it out")
        part.rows_per_epoch = count


def of_row(error: Problem, source: str) -> Problem:
    """`error` with the row that it is about."""
    message = f"{source}: {error.message}"
    return (
        MediaError(message, error.hint, error.reason)
        if isinstance(error, MediaError)
        else DataError(message, error.hint)
    )


def all_faults(problems: list[Problem]) -> EvsTrainError:
    """One error that lists them; a `MediaError` when all are of media."""
    if len(problems) == 1:
        return problems[0]
    kind = MediaError if all(isinstance(problem, MediaError) for problem in problems) else DataError
    lines = [f"  {problem}" for problem in problems[:SHOWN_ROWS]]
    if len(problems) > SHOWN_ROWS:
        lines.append(f"  ... and {len(problems) - SHOWN_ROWS} more")
    return kind("\n".join([f"{len(problems)} bad rows or files:", *lines]), "correct or remove them")


def _sample(
    row: Any, row_id: str, source: str, finder: MediaFinder, row_format: str = "auto", *, prompt: bool = False
) -> tuple[Sample, str]:
    """The sample that a row is, and the name of its format."""
    if isinstance(row, DataError):
        raise row
    draft, name = read_row(row, row_format)
    if not prompt and not any(message["role"] == "assistant" for message in draft.messages):
        raise DataError("no assistant turn", "without an answer there is nothing to learn from; remove the row")
    if prompt and draft.messages[-1]["role"] != "user":
        raise DataError(f"the last turn is the {draft.messages[-1]['role']}'s", "a prompt ends with the user's turn")
    sample = Sample(
        id=row_id if row.get("id") is None else str(row["id"]),
        source=source,
        messages=draft.messages,
        videos=tuple(map(finder.video, draft.videos)),
        images=tuple(map(finder.image, draft.images)),
    )
    return sample, name
