"""Exceptions a user can meet, each with the exit code and the hint that go with it.

Every error raised for something the user wrote or owns (a recipe, a row, a media file, a checkpoint) is an
`EvsTrainError`. Entry points print it as one line, without a traceback, and leave with its exit code; see `report`.
Anything else that escapes is a defect of this package and keeps its traceback.
"""

from __future__ import annotations

import atexit
import os
import sys
from typing import Literal, NoReturn

from evs_train.redaction import redact

EXIT_CODES = {
    0: "Done: trained, and exported if the recipe says so.",
    1: "A defect of this package, with a traceback. `torchrun` itself always leaves with 1 when a process failed.",
    2: "Something you gave is wrong: a recipe, row, media file or checkpoint. One line says what, and what to do.",
    3: "Too many samples are bad. The line has their number by reason, and where they are listed.",
    5: "Too many steps had a loss or gradient that is not finite. The line names samples, and where they are listed.",
    74: "A disk is full, or refuses. Nothing you gave is wrong: make room, then start again with `train.resume=auto`.",
    75: "Told to end by SIGTERM or SIGUSR1: a checkpoint is saved. Start it again with `train.resume=true`.",
    138: "Ended at once by a further SIGUSR1 (128 + 10), without saving.",
    143: "Ended at once by a further SIGTERM (128 + 15), without saving.",
}
"""All codes with which a program of this package leaves; docs/reliability.md shows this table."""


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


class NotFiniteError(EvsTrainError):
    """More steps than `train.max_skipped_steps` had a loss or gradient that is NaN or infinite."""

    exit_code = 5


class PreemptedError(EvsTrainError):
    """The run was told to end, and has saved. Not a fault: 75 is EX_TEMPFAIL, "try again" (sysexits.h)."""

    exit_code = 75


class ModelError(EvsTrainError):
    """A checkpoint cannot be used: unsupported architecture, missing files, tensor names that differ."""


class StorageError(EvsTrainError):
    """A run's files cannot be written: the disk is full, or refuses. 74 is EX_IOERR (sysexits.h).

    Not 2: a script that starts a run again once there is room must not do so for a recipe that is wrong.
    """

    exit_code = 74


class ServerError(EvsTrainError):
    """A model server cannot be reached, refuses a request, or answers in another form than OpenAI's."""


ON_ALL_RANKS = (BudgetError, NotFiniteError, PreemptedError)
"""What ends a training on every rank in the same step; the others may be met by one rank alone."""


def report(error: EvsTrainError) -> int:
    """Print `error` for a person on stderr and return the exit code of the process."""
    print(f"error: {redact(error.message)}", file=sys.stderr)
    if error.hint:
        print(f"  hint: {redact(error.hint)}", file=sys.stderr)
    return error.exit_code


def leave(code: int) -> NoReturn:
    """End this process with `code` when its work is done, whatever its libraries' threads do meanwhile.

    What was registered to run at exit runs. Taking the interpreter and its libraries apart is left out: a thread of
    C++ that then wants the interpreter, or outlives the object it belongs to, aborts the process (SIGABRT, "terminate
    called without an active exception"), and a run that is done would count as failed.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
