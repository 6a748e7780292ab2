"""What a run leaves in its folder so that it can be told apart and continued: its record, and which checkpoint is its.

Invariant: a run goes on from a checkpoint only if it is the run that made it (`resume.py`), and files of an earlier run
in the same folder never pass for the new one's. Cost: one small JSON file.
This module does not write checkpoints; the trainer does.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from evs_train.data.quarantine import QUARANTINE_FILE
from evs_train.errors import RecipeError
from evs_train.resume import refuse_differences, resumption

RECORD_FILE = "record.json"
EXPORT_RECORD = "evs_train_record.json"
"""The record of the run that an export came from, in the exported folder."""
_OF_A_RUN = (RECORD_FILE, "metrics.jsonl", QUARANTINE_FILE, "pictures", "final", "export", "checkpoint-*")


def write_record(output: Path, record: dict[str, Any]) -> None:
    """Write the run's record (recipe, fingerprint of the data, versions) into its folder."""
    (output / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_record(output: Path) -> dict[str, Any]:
    """The record of the run in `output`. Raises RecipeError when there is none, or it is not JSON."""
    file = output / RECORD_FILE
    if not file.is_file():
        raise RecipeError(f"{output} holds no run", f"training writes {RECORD_FILE} there at its start")
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"{file} is not valid JSON: {error}", "training writes it at its start") from error
    return record


def checkpoint_to_resume(output: Path, record: dict[str, Any]) -> str:
    """The newest checkpoint in `output`, if the run that made it is the one that `record` describes.

    Raises:
        RecipeError: there is none, it is the end of its run, or the run was another one; both values are named
            (`resume.py` says what makes another one).
    """
    checkpoint: str | None = get_last_checkpoint(str(output))
    if checkpoint is None:
        raise RecipeError(f"train.resume: there is no checkpoint in {output}", "start anew with train.resume=false")
    refuse_differences(read_record(output), record, str(output))
    if int(checkpoint.rsplit("-", 1)[1]) >= record["num_steps"]:
        raise RecipeError(f"train.resume: {checkpoint} is the end of the run", f"evs-train export run={output}")
    return checkpoint


def resumptions(output: Path, record: dict[str, Any], checkpoint: str) -> list[dict[str, Any]]:
    """What the record says of each time that the run in `output` was resumed, the one from `checkpoint` last."""
    before = read_record(output)
    return [*before.get("resumed", []), resumption(before, record, Path(checkpoint).name)]


def set_aside(output: Path) -> None:
    """Move what an earlier run left in `output` to `output/older/TIME`: none of it may pass for the new run's."""
    found = [path for name in _OF_A_RUN for path in sorted(output.glob(name))]
    if found:
        older = output / "older" / time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        older.mkdir(parents=True, exist_ok=True)
        for path in found:
            path.rename(older / path.name)
