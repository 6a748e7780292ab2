"""Which files are read, how much of each, and with what weight.

A listing is a .yaml file as LLaVA-NeXT trains from: `datasets`, each with `json_path` and `sampling_strategy`
(scripts/train/onevision.yaml and the code that reads it, read: percentages are rounded up), and here `weight`,
`format`, `media_root` and `frames_fps` as well.

Invariant: which rows a subset has, and how many rows of each source an epoch shows, follow from the files and the
listing alone; the seed of the run only orders them. Weights are shares of an epoch, met to less than one row. Either
all sources have one or none has: without weights an epoch shows each row once.
Cost: percentages, `end` and `random` read a file twice, to count it first.
"""

from __future__ import annotations

import difflib
import glob
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, ValidationError

from evs_train.data.media import lies_in
from evs_train.data.readers import Number, read_file
from evs_train.data_config import DataSection, RowFormatName, Section
from evs_train.errors import DataError
from evs_train.recipe import parse_yaml

_SUBSET_SEED = 0x5AB5E7
_SUBSET = re.compile(r"(first|end|random):(?:([1-9][0-9]*)|([0-9]+(?:\.[0-9]+)?)%)")


class ListedSource(Section):
    """One entry of a listing."""

    json_path: str = Field(description="file of rows, or a pattern of them, from the listing's folder")
    sampling_strategy: str = Field(
        "all", description="all, or first:N, end:N, random:N, where N is rows or a share: 10%"
    )
    weight: float | None = Field(None, gt=0, description="share of an epoch, in proportion to the others'")
    format: RowFormatName | None = None
    media_root: str | None = None
    frames_fps: float | None = Field(None, gt=0)


class Listing(Section):
    """A .yaml listing of sources."""

    datasets: list[ListedSource] = Field(min_length=1)


@dataclass(frozen=True)
class RowSource:
    """Files that are read alike and weighed together.

    Args:
        name: the path or pattern as given, for messages and records.
        files: what it stands for, by name.
        media_root: folder of relative media paths if one was set.
        row_format: name of the format of the rows, or auto.
        frames_fps: frames per second of videos that are folders or lists of frames.
        strategy: which of the rows are taken, as `sampling_strategy` says.
        weight: share of an epoch, in proportion to the others'.
    """

    name: str
    files: tuple[Path, ...]
    media_root: Path | None = None
    row_format: str = "auto"
    frames_fps: float | None = None
    strategy: str = "all"
    weight: float | None = None

    def rows(self) -> Iterator[tuple[Path, Number, Any]]:
        """File, number and row of what the strategy takes, in order. Raises DataError."""
        numbered = ((path, number, row) for path in self.files for number, row in read_file(path))
        if self.strategy == "all":
            yield from numbered
            return
        match = _SUBSET.fullmatch(self.strategy)
        assert match is not None  # checked by `sources`
        kind, amount, percent = match.groups()
        if kind == "first" and amount:
            yield from islice(numbered, int(amount))
            return
        total = sum(1 for path in self.files for _ in read_file(path))
        count = min(total, int(amount) if amount else math.ceil(Fraction(percent) * total / 100))
        chosen = set(subset_of(kind, count, total))
        yield from (row for index, row in enumerate(numbered) if index in chosen)


@dataclass
class Part:
    """What was read of one source.

    Args:
        source: what was read.
        num_rows: its rows.
        formats: how many rows were read as which format.
        rows_per_epoch: how many rows of it an epoch shows.
    """

    source: RowSource
    num_rows: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    rows_per_epoch: int = 0

    def describe(self) -> str:
        """One line for a person."""
        formats = ", ".join(f"{count:,} {name}" for name, count in self.formats.items())
        share = (
            "" if self.source.weight is None else f", {self.rows_per_epoch:,} an epoch by weight {self.source.weight:g}"
        )
        return f"{self.source.name}: {self.num_rows:,} rows ({formats}){share}"


def subset_of(kind: str, count: int, total: int) -> Sequence[int]:
    """Row numbers, ascending, of the first, last or any `count` of `total`; the same ones whenever asked."""
    if kind == "random":
        return [
            int(index) for index in np.sort(np.random.default_rng([_SUBSET_SEED, total]).permutation(total)[:count])
        ]
    return range(count) if kind == "first" else range(total - count, total)


def sources(data: DataSection) -> list[RowSource]:
    """The sources that `data.rows` names, listings unfolded.

    Raises:
        DataError: a listing is malformed, a pattern matches nothing, or only some of the sources have weights.
    """
    root = None if data.media_root is None else Path(data.media_root)
    found: list[RowSource] = []
    for entry in data.rows:
        if Path(entry).suffix.lower() in (".yaml", ".yml"):
            found += _read_listing(Path(entry), data, root)
        else:
            found.append(RowSource(entry, _files(entry), root, data.format, data.frames_fps))
    without = [source.name for source in found if source.weight is None]
    if without and len(without) < len(found):
        raise DataError(f"{without[0]} has no weight, but others have", "give each source a weight, or none of them")
    return found


def rows_per_epoch(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many rows of each source an epoch of sum(sizes) rows shows: its share, by largest remainder.

    Of equal remainders the earlier source's is rounded up. Fractions, so that it is the same on every machine.
    """
    total, whole = sum(sizes), sum(map(Fraction, weights))
    shares = [Fraction(weight) * total / whole for weight in weights]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda index: counts[index] - shares[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def _read_listing(path: Path, data: DataSection, root: Path | None) -> list[RowSource]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: listing cannot be read: {error}", "check the path") from error
    try:
        listing = Listing.model_validate(parse_yaml(text, str(path)))
    except ValidationError as error:
        faults = "\n  ".join(_fault(fault) for fault in error.errors())
        raise DataError(f"{path}: the listing is wrong:\n  {faults}", "its keys are told in docs/data.md") from error
    found = []
    for number, entry in enumerate(listing.datasets, start=1):
        if entry.sampling_strategy != "all" and not _SUBSET.fullmatch(entry.sampling_strategy):
            raise DataError(
                f"{path}: entry {number}: unknown sampling_strategy {entry.sampling_strategy!r}",
                "all, first:N, end:N or random:N, where N is a number of rows or a share such as 10%",
            )
        own_root = None if entry.media_root is None else path.parent / entry.media_root
        if own_root is not None and root is not None and not (data.allow_outside or lies_in(str(own_root), str(root))):
            raise DataError(
                f"{path}: entry {number}: its media_root lies outside data.media_root: {own_root}",
                "data.allow_outside: true takes it; or unset data.media_root",
            )
        found.append(
            RowSource(
                name=entry.json_path,
                files=_files(str(path.parent / entry.json_path)),
                media_root=own_root or root,
                row_format=entry.format or data.format,
                frames_fps=entry.frames_fps or data.frames_fps,
                strategy=entry.sampling_strategy,
                weight=entry.weight,
            )
        )
    return found


def _fault(fault: Any) -> str:
    place = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = [*Listing.model_fields, *ListedSource.model_fields]
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
        return f"{place}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    return f"{place}: {fault['msg']}" if place else str(fault["msg"])


def _files(entry: str) -> tuple[Path, ...]:
    """The file, or those that a pattern matches, by name."""
    if os.path.exists(entry) or not glob.has_magic(entry):  # of a name that is too long, Path.exists raises
        return (Path(entry),)
    files = tuple(map(Path, sorted(glob.glob(entry))))
    if not files:
        raise DataError(f"{entry}: no file matches", "check the pattern")
    return files
