"""What a run leaves in its folder so that it can be told apart and continued: its record, and which checkpoint is its.

Invariant: a run goes on from a checkpoint only if seed, rows, rates, base and batch are those that made it, and files
of an earlier run in the same folder never pass for the new one's. Cost: one small JSON file.
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
from evs_train.redaction import redact, restore

RECORD_FILE = "record.json"
EXPORT_RECORD = "evs_train_record.json"
"""The record of the run that an export came from, in the exported folder."""
_SAME_ON_RESUME = ("seed", "num_steps", "step", "data_fingerprint", "base_model", "evs", "objective")
_OF_A_RUN = (RECORD_FILE, "metrics.jsonl", QUARANTINE_FILE, "pictures", "final", "export", "checkpoint-*")


def write_record(output: Path, record: dict[str, Any]) -> None:
    """Write the run's record (recipe, fingerprint of the data, versions) into its folder."""
    (output / RECORD_FILE).write_text(json.dumps(redact(record), indent=2) + "\n", encoding="utf-8")


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


def checkpoint_to_resume(output: Path, record: dict[str, Any]) -> str:
    """The newest checkpoint in `output`, if the run that made it is the one that `record` describes.

    Raises:
        RecipeError: there is none, it is the end of its run, or the run was another one; both values are named.
    """
    checkpoint: str | None = get_last_checkpoint(str(output))
    if checkpoint is None:
        raise RecipeError(f"train.resume: there is no checkpoint in {output}", "start anew with train.resume=false")
    before, record = read_record(output), restore(redact(record))  # both without secrets
    differing = [
        f"{name} (was {before.get(name)}, is {record[name]})"
        for name in _SAME_ON_RESUME
        if before.get(name) != record[name]
    ]
    if differing:
        raise RecipeError(
            f"train.resume: {output} was another run: {'; '.join(differing)}",
            "rows would be skipped or repeated; restore these, or start anew with train.resume=false",
        )
    if int(checkpoint.rsplit("-", 1)[1]) >= record["num_steps"]:
        raise RecipeError(f"train.resume: {checkpoint} is the end of the run", f"evs-train export run={output}")
    return checkpoint


def set_aside(output: Path) -> None:
    """Move what an earlier run left in `output` to `output/older/TIME`: none of it may pass for the new run's."""
    found = [path for name in _OF_A_RUN for path in sorted(output.glob(name))]
    if found:
        older = output / "older" / time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        older.mkdir(parents=True, exist_ok=True)
        for path in found:
            path.rename(older / path.name)
