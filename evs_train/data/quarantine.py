"""What becomes of samples that cannot be read: recorded one by one, counted by reason, and a budget that ends the run.

`data/batches.py` shows another sample in the place of a bad one and attaches what it met to the example; the trainer
hands that of all ranks to a `Quarantine`, once per optimizer step. So every rank holds the same counts and meets the
end of the budget in the same step, and one process writes the file.

Invariant: `quarantine.jsonl` holds one line for each draw and bad sample, in the order of draws within a step, and the
counts are those of its lines; a resumed run drops the lines of steps that it trains again and counts on from the rest.
Cost: nothing while all samples are good. This module does not read samples and knows nothing of ranks.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evs_train.data_config import DataSection
from evs_train.disk import replace_text, whole_lines
from evs_train.errors import BudgetError, Reason
from evs_train.redaction import redact

QUARANTINE_FILE = "quarantine.jsonl"
MIN_DRAWS = 100
"""Draws that must have been read before their bad share is judged: the first bad one of ten is no evidence."""


@dataclass(frozen=True)
class BadSample:
    """One sample that one draw could not show.

    Attributes:
        draw: place in the global order of the run.
        step: optimizer step that reads it.
        attempt: 0 for the draw's own sample, 1 for the first one tried in its place, and so on.
        sample_id: id of the row.
        row: data file and row, for people.
        file: the media file that is to blame, or None if the row is.
        reason: what it is counted by.
        message: what is wrong.
    """

    draw: int
    step: int
    attempt: int
    sample_id: str
    row: str
    file: str | None
    reason: Reason
    message: str


class NoneLeftError(BudgetError):
    """All samples tried for one draw are bad. Travels as a value to the process that trains; see `batches.py`."""

    def __init__(self, bad: Sequence[BadSample]) -> None:
        super().__init__(
            f"draw {bad[0].draw} found no sample that can be read; the last one: {bad[-1].message}",
            "correct or remove them (evs-train check finds all of them)",
        )
        self.bad = tuple(bad)


@dataclass(frozen=True)
class Found:
    """What one rank met in one optimizer step.

    Attributes:
        num_draws: draws that were read.
        lines: lines for the file, as mappings.
        none_left: some draw found no sample at all.
    """

    num_draws: int
    lines: list[dict[str, Any]]
    none_left: bool


class Quarantine:
    """Bad samples of a run, over all ranks; equal on every rank.

    Attributes:
        reasons: bad samples by reason, each counted once per draw.
        num_draws: draws that were read, of all steps of the run.
    """

    def __init__(self, path: Path, data: DataSection, draws_before: Callable[[int], int]) -> None:
        """`draws_before` says how many draws the steps before one read."""
        self.path = path
        self.data = data
        self._draws_before = draws_before
        self.num_draws = 0
        self.reasons: Counter[str] = Counter()
        self._bad_draws: set[int] = set()

    def begin(self, step: int, *, writes: bool) -> None:
        """Start at optimizer step `step`: lines of later steps, which will be trained again, do not count.

        `writes`: this process also removes them from the file. The file is replaced whole, so the others read either
        state and count the same.
        """
        lines: list[dict[str, Any]] = []
        if self.path.exists():
            lines = [line for line in map(json.loads, whole_lines(self.path)) if line["step"] < step]
            if writes:
                replace_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        self.num_draws, self.reasons, self._bad_draws = self._draws_before(step), Counter(), set()
        self._count(lines)

    def lines_of(self, bad: Sequence[BadSample], shown: str | None) -> list[dict[str, Any]]:
        """Lines for the file about one draw; `shown` is the id of the sample that it shows in their place."""
        return [
            {
                "draw": one.draw,
                "step": one.step,
                "attempt": one.attempt,
                "sample": one.sample_id,
                "row": one.row,
                "file": one.file,
                "reason": one.reason,
                "message": one.message,
                "shown": shown,
            }
            for one in bad
        ]

    def add(self, found: Found, *, writes: bool) -> None:
        """Count, record and judge what all ranks together met in one step. `writes`: this process writes the file.

        Raises:
            BudgetError: the run must end; says how many are bad, why, and where they are listed.
        """
        lines = sorted(found.lines, key=lambda line: (line["draw"], line["attempt"]))
        self.num_draws += found.num_draws
        self._count(lines)
        if writes and lines:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in redact(lines)))
        share = len(self._bad_draws) / max(self.num_draws, 1)
        if found.none_left:
            self._end(f"{self.data.max_bad_in_a_row} samples in a row are bad", "data.max_bad_in_a_row")
        if self.num_draws >= MIN_DRAWS and share > self.data.max_bad_share:
            self._end(
                f"{len(self._bad_draws)} of {self.num_draws} draws ({share:.1%}) met bad samples", "data.max_bad_share"
            )

    def metrics(self) -> dict[str, float]:
        """Bad samples since the run began, in all and by reason."""
        by_reason = {f"data/quarantined/{reason.replace(' ', '_')}": n for reason, n in sorted(self.reasons.items())}
        return {"data/quarantined": float(self.reasons.total()), **{name: float(n) for name, n in by_reason.items()}}

    def _count(self, lines: Sequence[dict[str, Any]]) -> None:
        self.reasons.update(line["reason"] for line in lines)
        self._bad_draws.update(line["draw"] for line in lines)

    def _end(self, what: str, key: str) -> None:
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common())
        raise BudgetError(
            f"too many bad samples: {what}; by reason: {reasons}; listed in {self.path}",
            f"correct or remove them (evs-train check finds all of them), or raise {key}",
        )
