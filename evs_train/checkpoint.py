"""What a run leaves in its folder so that it can be told apart and continued: its record, and which checkpoint is its.

Invariant: a run goes on from a checkpoint only if it is the run that made it (`resume.py`), and files of an earlier run
in the same folder never pass for the new one's. Cost: one small JSON file.
This module does not write checkpoints: the trainer does, and `commit.py` says which are whole.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from pathlib import Path
from typing import Any

from evs_train.commit import Checkpoints
from evs_train.data.quarantine import QUARANTINE_FILE
from evs_train.disk import replace_text
from evs_train.errors import RecipeError
from evs_train.redaction import redact, restore
from evs_train.resume import refuse_differences, resumption

_log = logging.getLogger(__name__)

RECORD_FILE = "record.json"
EXPORT_RECORD = "evs_train_record.json"
"""The record of the run that an export came from, in the exported folder."""
_OF_A_RUN = (
    RECORD_FILE,
    "metrics.jsonl",
    QUARANTINE_FILE,
    "not_finite.jsonl",
    "pictures",
    "final",
    "export",
    "checkpoint-*",
)


def write_record(output: Path, record: dict[str, Any]) -> None:
    """Write the run's record (recipe, fingerprint of the data, versions) into its folder."""
    replace_text(output / RECORD_FILE, json.dumps(redact(record), indent=2) + "\n")


def read_record(output: Path) -> dict[str, Any]:
    """The record of the run in `output`. Raises RecipeError when there is none, or it is not JSON."""
    file = output / RECORD_FILE
    if not file.is_file():
        raise RecipeError(f"{output} holds no run", f"training writes {RECORD_FILE} there at its start")
    try:
        record: dict[str, Any] = restore(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise RecipeError(f"{file} is not valid JSON: {error}", "training writes it at its start") from error
    return record


def _as_read(record: dict[str, Any]) -> dict[str, Any]:
    """The record as it would be read back: without secrets."""
    read: dict[str, Any] = restore(redact(record))
    return read


def checkpoint_to_resume(checkpoints: Checkpoints, record: dict[str, Any], *, auto: bool = False) -> str | None:
    """The newest whole checkpoint, if the run that made it is the one that `record` describes.

    Its files are hashed before anything reads them. Every process must call this. A run that is over but was killed
    before its weights were in `final/` goes on from its last checkpoint, too, and has no step left to do.

    Args:
        auto: whether a folder without any checkpoint, where a run was killed before its first one, gives None: start.
            And a run that is over is no error: what is missing behind its last checkpoint is written.

    Raises:
        RecipeError: there is no whole one (each broken one is named, with the reason), the run is over, or it was
            another one (`resume.py` says what makes another one); both values are named.
    """
    output = checkpoints.output
    found = checkpoints.newest_whole()
    broken = "; ".join(f"{name}: {fault}" for name, fault in found.broken.items())
    if found.path is None:
        if auto and not broken and not (output / "final").exists():
            return None
        if broken:
            raise RecipeError(
                f"train.resume: no checkpoint in {output} is whole: {broken}",
                "restore one, or start anew with train.resume=false, which moves them to older/",
            )
        what = "a run's final weights, and no checkpoint" if (output / "final").exists() else "no checkpoint"
        raise RecipeError(f"train.resume: {output} holds {what}", "start anew with train.resume=false")
    checkpoint = str(found.path)
    if broken and checkpoints.ranks.rank == 0:
        _log.warning("going on from %s, the newest that is whole; %s", checkpoint, broken)
    refuse_differences(read_record(output), _as_read(record), str(output))
    is_over = int(checkpoint.rsplit("-", 1)[1]) >= record["num_steps"]
    if is_over and not auto and (output / "final").is_dir():
        raise RecipeError(f"train.resume: {checkpoint} is the end of the run", f"evs-train export run={output}")
    return checkpoint


def resumptions(output: Path, record: dict[str, Any], checkpoint: str) -> list[dict[str, Any]]:
    """What the record says of each time that the run in `output` was resumed, the one from `checkpoint` last."""
    before = read_record(output)
    return [*before.get("resumed", []), resumption(before, _as_read(record), Path(checkpoint).name)]


def set_aside(output: Path) -> None:
    """Move what an earlier run left in `output` to `output/older/TIME`: none of it may pass for the new run's."""
    found = [path for name in _OF_A_RUN for path in sorted(output.glob(name))]
    if found:
        older = output / "older" / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
        older.mkdir(parents=True)
        for path in found:
            path.rename(older / path.name)
        _log.warning(redact(f"{output} holds an earlier run, which was moved to {older}"))
