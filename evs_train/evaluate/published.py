"""Rows of published benchmarks: their fields, each checked as it is read, and the question that they make.

Invariant: a file of another form is refused by file, row and field. Cost: one row in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evs_train.data.formats import kind_of
from evs_train.data.readers import Number, read_file
from evs_train.errors import DataError
from evs_train.evaluate.data import Asked
from evs_train.strict import read_json

_HINT = "is it the file of this benchmark?"


@dataclass(frozen=True)
class PublishedRow:
    """One row of a file of questions."""

    path: Path
    number: Number
    values: dict[str, Any]

    @property
    def where(self) -> str:
        return f"{self.path} row {self.number}"

    def text(self, key: str) -> str:
        """A field that is text. Raises DataError."""
        value = self.values.get(key)
        if not isinstance(value, str):
            raise DataError(f'{self.where}: "{key}" is {kind_of(value)}', _HINT)
        return value

    def texts(self, key: str) -> list[str]:
        """A field that is a list; numbers in it become text. Raises DataError."""
        value = self.values.get(key)
        if not isinstance(value, list):
            raise DataError(f'{self.where}: "{key}" is {kind_of(value)}', _HINT)
        return [str(one) for one in value]

    def asked(
        self,
        name: str,
        video: Any,
        text: str,
        *,
        choices: Sequence[str],
        right: str,
        types: Sequence[str] = (),
        prefix: str = "",
        segment: tuple[float, float] | None = None,
    ) -> Asked:
        """The question about one video that the row makes."""
        turn = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}
        return Asked(
            id=name,
            source=self.where,
            messages=(turn,),
            videos=(video,),
            answers=(right,),
            choices=tuple(choices),
            types=tuple(types),
            prefix=prefix,
            segment=segment,
        )


def rows_of_file(path: Path) -> Iterator[PublishedRow]:
    """All rows of a file. Raises DataError as `read_file`, or where a row is no object."""
    for number, values in read_file(path):
        if isinstance(values, DataError):
            raise DataError(f"{path} row {number}: {values.message}", values.hint)
        if not isinstance(values, dict):
            raise DataError(f"{path} row {number} is {kind_of(values)}", _HINT)
        yield PublishedRow(path, number, values)


def json_object(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object. Raises DataError."""
    try:
        value = read_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", "is it the folder of this benchmark?") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}", "download it again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds {kind_of(value)}", _HINT)
    return value
