"""What was answered, one line of JSON for each question, rate and model, so that a killed evaluation goes on.

`settings.json` says what the records in a folder belong to: data, models, prompts, sampling. An evaluation with others
is refused, rather than mixed in; other rates, tolerance or intervals are not settings, so points can be added later.

Invariant: a line is written in one piece when all of a question's rates are answered, and a line torn by a kill is
dropped. Every process appends to a file of its own. Cost: a few hundred bytes a line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from evs_train.checkpoint import EXPORT_RECORD
from evs_train.errors import RecipeError
from evs_train.redaction import redact

SETTINGS_FILE = "settings.json"
_OF_AN_EXPORT = "video_pruning_rate"


@dataclass(frozen=True)
class Record:
    """One answer.

    Attributes:
        model: place among the models of the evaluation.
        question, video, types: of the `Question`.
        rate: asked for.
        correct: whether it counts as right.
        said: the choice that is likeliest, or the generated answer.
        scores: log-likelihood of each choice; empty for generated answers.
        exact, contains: whether a free answer is right either way; None for choices.
        video_tokens, retained: of all its videos, before and after pruning.
        selected: of the retained ones, those that the language model does not drop; None where it drops none.
        tokens: of the pruned prompt.
        first_unit_only: of some video with several units only the first is left, so nothing that moves can be seen.
        prefill_seconds, dense_seconds, encode_seconds: medians, measured in turns on some questions; None on others.
        peak_bytes: most GPU memory in use during that prefill.
        proof: of a server, whether its count of tokens shows pruning (`server.py`).
    """

    model: int
    question: str
    video: str
    types: tuple[str, ...]
    rate: float
    correct: bool
    said: str
    scores: tuple[float, ...] = ()
    exact: bool | None = None
    contains: bool | None = None
    video_tokens: int | None = None
    retained: int | None = None
    selected: int | None = None
    tokens: int | None = None
    first_unit_only: bool = False
    prefill_seconds: float | None = None
    dense_seconds: float | None = None
    encode_seconds: float | None = None
    peak_bytes: int | None = None
    proof: str | None = None


class RecordFile:
    """The records that one process appends."""

    def __init__(self, folder: Path, rank: int) -> None:
        path = folder / "records" / f"{rank:05}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.read_bytes() if path.exists() else b""
        if not whole.endswith(b"\n") and whole:  # torn by a kill
            path.write_bytes(whole[: whole.rfind(b"\n") + 1])
        self._file = path.open("a", encoding="utf-8")

    def append(self, records: Iterable[Record]) -> None:
        """Write the records of one question."""
        self._file.write("".join(json.dumps(asdict(record)) + "\n" for record in records))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_records(folder: Path) -> list[Record]:
    """All whole records of a folder, whichever process wrote them."""
    names = {field.name for field in fields(Record)}
    found: dict[tuple[int, str, float], Record] = {}
    for path in sorted((folder / "records").glob("*.jsonl")):
        for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last newline is torn, or nothing
            values = {name: value for name, value in json.loads(line).items() if name in names}
            record = Record(**{**values, "types": tuple(values["types"]), "scores": tuple(values["scores"])})
            found[record.model, record.question, record.rate] = record
    return list(found.values())


def agree_on_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write what the records of a folder belong to, or check that it is the same.

    Raises:
        RecipeError: the folder holds records of another evaluation; the differing keys are named.
    """
    file = folder / SETTINGS_FILE
    wanted = redact(json.loads(json.dumps(settings)))
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        differing = [key for key in {**before, **wanted} if before.get(key) != wanted.get(key)]
        if differing:
            shown = "; ".join(f"{key} was {_short(before.get(key))}, is {_short(wanted.get(key))}" for key in differing)
            raise RecipeError(
                f"{folder} holds another evaluation: {shown}", "name another folder with out=DIR, or remove this one"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")


def model_identity(checkpoint: str) -> dict[str, Any]:
    """What tells a checkpoint's weights from others: names, sizes and times of its files. A hub name is its own."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return {"name": checkpoint}
    files = sorted(folder.glob("*.safetensors"))
    return {
        "name": folder.name,
        "weights": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
    }


def run_of_export(checkpoint: str) -> str | None:
    """What names the run that an export came from; None for other checkpoints."""
    file = Path(checkpoint) / EXPORT_RECORD
    return run_identity(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def run_identity(record: dict[str, Any]) -> str:
    """SHA-256 (hex) of a run's record, whichever rate it was exported at."""
    kept = {key: value for key, value in record.items() if key != _OF_AN_EXPORT}
    return hashlib.sha256(json.dumps(redact(kept), sort_keys=True).encode()).hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
