"""Exceptions a user can meet, each with the exit code and the hint that go with it.

Every error raised for something the user wrote or owns (a recipe, a row, a media file, a checkpoint) is an
`EvsTrainError`. Entry points print it as one line, without a traceback, and leave with its exit code; see `report`.
Anything else that escapes is a defect of this package and keeps its traceback.
"""

from __future__ import annotations

import sys
from typing import Literal

from evs_train.redaction import redact


class EvsTrainError(Exception):
    """Base of all errors shown to the user as one line: `message`, then the `hint` that says what to do.

    Args:
        message: what is wrong, naming the file, row or key.
        hint: what to do about it; may be empty.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class RecipeError(EvsTrainError):
    """The recipe or a command-line override is wrong: unknown key, bad value, missing file."""


Reason = Literal[
    "missing", "not a file", "no permission", "empty", "not a video", "not an image", "truncated", "damaged",
    "no video stream", "no frames", "no timestamps", "timeout", "crash", "out of memory", "too large", "too long",
    "undecodable", "bad row", "template", "changed",
]  # fmt: skip
"""Why a media file or a row cannot be used; what quarantine and metrics count by."""


class DataError(EvsTrainError):
    """A row of a data file is malformed, contradicts itself, or does not fit the chat template or the recipe."""

    def __init__(self, message: str, hint: str = "", reason: Reason = "bad row") -> None:
        super().__init__(message, hint)
        self.reason = reason


class MediaError(EvsTrainError):
    """A video or image file is missing or cannot be decoded, for one of a few named reasons."""

    def __init__(self, message: str, hint: str = "", reason: Reason = "undecodable") -> None:
        super().__init__(message, hint)
        self.reason = reason


class BudgetError(EvsTrainError):
    """More samples are bad than `data.max_bad_share` or `data.max_bad_in_a_row` allows."""

    exit_code = 3


class ModelError(EvsTrainError):
    """A checkpoint cannot be used: unsupported architecture, missing files, tensor names that differ."""


class ServerError(EvsTrainError):
    """A model server cannot be reached, refuses a request, or answers in another form than OpenAI's."""


def report(error: EvsTrainError) -> int:
    """Print `error` for a person on stderr and return the exit code of the process."""
    print(f"error: {redact(error.message)}", file=sys.stderr)
    if error.hint:
        print(f"  hint: {redact(error.hint)}", file=sys.stderr)
    return error.exit_code
