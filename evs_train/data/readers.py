"""Files of rows, by suffix, each to a stream of numbered rows.

Invariant: a file is either read to its end or refused by name; a row that cannot be parsed comes out as its error, so
that the rows after it are still judged. What a row says is not looked at (`formats.py`).

Cost: one row in memory at a time, also of a .json list and of a Parquet row group's batch; tables are read through
`datasets` without a cache on disk. Not here: downloads, and bytes of media inside tables.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

from evs_train.data.shards import read_shard
from evs_train.errors import DataError
from evs_train.strict import StrictError, read_json, read_json_at

Number = int | str
"""What a row is called in its file: its number from 1, in JSONL that of its line, in a tar shard its key."""
Rows = Iterator[tuple[Number, Any]]

_ROWS = "; videos and images are named in rows (docs/data.md)"
_CHUNK = 1 << 20
_BATCH = 1024
MOST_UNPACKED = 2 << 30
"""Bytes of a Parquet row group that are always unpacked; a larger one may be `_MOST_PACKED` times its file."""
_MOST_PACKED = 100
_BOM = b"\xef\xbb\xbf"


def read_file(path: Path) -> Rows:
    """All rows of one file, numbered; a row that is no row comes as a `DataError` in its place.

    Raises:
        DataError: the file is missing, of an unknown kind, damaged, or empty.
    """
    suffix = "".join(path.suffixes[-2:]).lower() if path.suffix.lower() in _COMPRESSED else path.suffix.lower()
    if os.path.isdir(path):  # of a name that is too long, Path.is_dir raises
        reader: Callable[[Path], Rows] = _saved_dataset
    elif suffix.endswith(_COMPRESSED):
        raise DataError(f"{path}: a compressed file is not read", f"decompress it, to {path.stem}")
    elif suffix in READERS:
        reader = READERS[suffix]
    else:
        known = ", ".join(READERS)
        raise DataError(f"{path}: unknown kind of data file", f"known are {known}, and .yaml listings of them{_ROWS}")
    count = 0
    try:
        for numbered in reader(path):
            yield numbered
            count += 1
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{path}: data file cannot be read: {reason}", "check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text", "save the file as UTF-8") from error
    if count == 0:
        raise DataError(f"{path}: holds no rows")


def _json_list(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig") as file:
        text = _JsonText(file, path)
        if text.peek() != "[":
            text.refuse_whole()
        text.position += 1
        number = 0
        while text.peek() != "]":
            if number and text.peek() != ",":
                text.fail("Expecting ',' delimiter", text.position)
            text.position += bool(number)
            number += 1
            yield number, text.value()
        text.position += 1
        if text.peek():
            text.fail("Extra data", text.position)


class _JsonText:
    """A JSON file of which only the part around the current value is in memory."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self.file, self.path = file, path
        self.buffer, self.position = "", 0
        self.line, self.column = 1, 1  # of the start of the buffer

    def fill(self) -> bool:
        """Drop what was read and read on, as much again as is kept; whether there was more."""
        self.line, self.column = self._place(self.position)
        self.buffer, self.position = self.buffer[self.position :], 0
        more = self.file.read(max(_CHUNK, len(self.buffer)))
        self.buffer += more
        return bool(more)

    def peek(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while True:
            while self.position < len(self.buffer) and self.buffer[self.position] in " \t\r\n":
                self.position += 1
            if self.position < len(self.buffer):
                return self.buffer[self.position]
            if not self.fill():
                return ""

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = read_json_at(self.buffer, self.position)
            except json.JSONDecodeError as error:
                behind = error.pos - self.position
                if not self.fill():
                    self.fail(error.msg, behind)
            except StrictError as error:
                self.fail(str(error), self.position)
            else:
                if end < len(self.buffer) or not self.fill():  # at the end of the buffer a number may go on
                    self.position = end
                    return value

    def refuse_whole(self) -> NoReturn:
        """Say what a file is that is no list."""
        text = self.buffer[self.position :] + self.file.read()
        try:
            value = read_json(text)
        except StrictError as error:
            raise DataError(f"{self.path}: not JSON: {error}", "put the rows in [...]") from error
        except json.JSONDecodeError as error:
            hint = "one row on each line? Then name the file .jsonl"
            place = f"at line {error.lineno} column {error.colno}"
            raise DataError(f"{self.path}: not JSON: {error.msg} {place}", hint) from error
        kind = "an object" if isinstance(value, dict) else "a single value"
        raise DataError(f"{self.path}: holds {kind}, not a list of rows", "put the rows in [...]")

    def fail(self, message: str, position: int) -> NoReturn:
        line, column = self._place(position)
        raise DataError(f"{self.path}: not JSON: {message} at line {line} column {column}", "correct the file")

    def _place(self, position: int) -> tuple[int, int]:
        newlines = self.buffer.count("\n", 0, position)
        if newlines == 0:
            return self.line, self.column + position
        return self.line + newlines, position - self.buffer.rfind("\n", 0, position)


def _json_lines(path: Path) -> Rows:
    with path.open("rb") as file:  # in bytes only "\n" ends a line: JSON strings may hold other line separators
        for number, line in enumerate(file, start=1):
            raw = (line.removeprefix(_BOM) if number == 1 else line).strip()
            if raw:
                yield number, _parsed(raw)


def _parsed(raw: bytes) -> Any:
    try:
        return read_json(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return DataError(f"not UTF-8 text (byte {error.start} of the line)", "save the file as UTF-8")
    except StrictError as error:
        return DataError(f"not JSON: {error}", "each line must be one JSON object")
    except json.JSONDecodeError as error:
        return DataError(f"not JSON: {error.msg} at column {error.colno}", "each line must be one JSON object")


def _parquet(path: Path) -> Rows:
    return _table(path, "parquet")


def _arrow(path: Path) -> Rows:
    return _table(path, "arrow")


def _table(path: Path, kind: str) -> Rows:
    if not path.is_file():
        raise FileNotFoundError(2, "No such file", str(path))
    from datasets import load_dataset  # noqa: PLC0415 (half a second, and most rows are JSON)

    options = {"batch_size": _BATCH} if kind == "parquet" else {}  # else a whole row group at a time
    try:
        if kind == "parquet":
            _check_unpacked(path)
        yield from _numbered(
            load_dataset(kind, data_files=glob.escape(str(path)), split="train", streaming=True, **options)
        )
    # Of pyarrow, where a damaged length may ask for any memory, or of `datasets`, over what it notes in the file.
    except (ValueError, LookupError, TypeError, NotImplementedError, MemoryError) as error:
        raise DataError(f"{path}: cannot be read as {kind}: {error}", "write or copy the file again") from error


def _check_unpacked(path: Path) -> None:
    """Refuse a file that is small and unpacks to more than memory may hold, as no text does."""
    from pyarrow.parquet import ParquetFile  # noqa: PLC0415 (as above)

    with ParquetFile(path) as file:
        groups = [file.metadata.row_group(number).total_byte_size for number in range(file.metadata.num_row_groups)]
    largest = max(groups, default=0)
    if largest > max(MOST_UNPACKED, _MOST_PACKED * path.stat().st_size):
        raise DataError(
            f"{path}: unpacks to {largest / 2**30:.1f} GiB at a time, {largest // path.stat().st_size} times its size",
            "write it again with smaller row groups",
        )


def _saved_dataset(path: Path) -> Rows:
    """A folder written by `Dataset.save_to_disk`."""
    if (path / "dataset_dict.json").is_file():
        raise DataError(f"{path}: holds several splits", "name the folder of one of them")
    if not (path / "dataset_info.json").is_file():
        raise DataError(
            f"{path}: is a folder, but no data set written by save_to_disk",
            f"name its files of rows, such as folder/*.tar{_ROWS}",
        )
    # Not by `load_from_disk`: it maps the files and checks nothing, and damaged ones end the process (seen).
    state = path / "state.json"
    try:
        names = [entry["filename"] for entry in read_json(state.read_text(encoding="utf-8"))["_data_files"]]
        inside = [path / name for name in names if Path(name).name == name]
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{state}: names no data files: {error!r}", "write or copy the data set again") from error
    if len(inside) < len(names):
        raise DataError(f"{state}: names a data file that is not in the folder", "write the data set again")
    rows = (row for file in inside for _, row in _table(file, "arrow"))
    yield from enumerate(rows, start=1)


def _numbered(table: Any) -> Rows:
    """Rows of a streamed data set; columns of images and videos stay what is stored (path and bytes)."""
    rows: Iterable[dict[str, Any]] = table.decode(False)
    for number, row in enumerate(rows, start=1):
        yield number, {key: _listed(value) for key, value in row.items() if value is not None}


def _listed(value: Any) -> Any:
    """A list of objects where `datasets` gives one object of lists, as it does for its older `Sequence` columns."""
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    return value


READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": _json_list,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".tar": read_shard,
}
"""Reader of each kind of file, by suffix."""

_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")
