"""The base checkpoint's files: where they lie, and fingerprints by which a resumed run knows them again.

Invariant: fingerprints follow content and not place, so a copy in another folder, or the hub's cache of that commit,
has the same. Cost: small files are read whole. Of weights the header is read and 4 KiB in the middle of each tensor, 16
reads at a time: 16 GB of 750 tensors are 3 MB in 750 reads, under a second when each takes 5 ms (seen). Hashing them
whole would read 16 GB at every start in every process, and take 20 s of a core (0.8 GB/s, seen). What this cannot see:
a change that leaves the middle of every tensor as it was, such as one row of the embedding. Training that reaches a
tensor at all changes it nearly everywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

from huggingface_hub import snapshot_download

from evs_train.config import ModelSection
from evs_train.errors import ModelError

BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.txt", "*.model", "*.py", "LICENSE*")
"""Patterns of the files that belong to a checkpoint beside its weights."""
_HASHED_WHOLE = ("*.json", "*.jinja", "*.txt", "*.model", "*.py", "*.bin")
_SAMPLE = 4096  # bytes read of each tensor
_AT_ONCE = 16  # reads, which on a network disk wait rather than work
_SHOWN = 16  # hexadecimal digits


def base_folder(model: ModelSection, commit: str | None = None) -> Path:
    """Folder of the base checkpoint; for a hub name the cached copy, of `commit` or else of `model.revision`.

    Raises:
        ModelError: the hub does not give it, and it is not in the cache.
    """
    if Path(model.path).is_dir():
        return Path(model.path)
    patterns = ["*.safetensors", *BESIDE_WEIGHTS]
    revision = commit or model.revision
    try:
        return Path(snapshot_download(model.path, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the files of {model.path} cannot be had: {str(error).strip().splitlines()[0]}",
            "check model.path, model.revision and the network",
        ) from error


def commit_of(model: ModelSection, folder: Path) -> str | None:
    """Commit of the hub's repository that `folder` (of `base_folder`) holds; None for a directory of the user's.

    transformers no longer tells it (read, 5.23: a configuration drops `_commit_hash`); the hub's cache has a folder
    for each, of that name.
    """
    return None if Path(model.path).is_dir() else folder.name


def fingerprints(folder: Path) -> dict[str, str]:
    """First 16 hexadecimal digits of a SHA-256 for each file that says what the model in `folder` is, by file name.

    Raises:
        ModelError: a file cannot be read, or is not safetensors though it is called so.
    """
    prints: dict[str, str] = {}
    whole = {path for pattern in _HASHED_WHOLE for path in folder.glob(pattern)}
    for path in sorted([*whole, *folder.glob("*.safetensors")]):
        try:
            with path.open("rb") as file:
                if path in whole:
                    digest = hashlib.file_digest(file, "sha256")
                else:
                    digest = hashlib.sha256()
                    for piece in _pieces(file.fileno()):
                        digest.update(piece)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path} cannot be read: {error}", "the base checkpoint is damaged") from error
        prints[path.name] = digest.hexdigest()[:_SHOWN]
    return prints


def _pieces(file: int) -> Iterator[bytes]:
    """Size and header of an open safetensors file, and the middle of each of its tensors.

    The format: 8 bytes with the header's length, the header (JSON: name to dtype, shape and place), the tensors.
    """
    size = os.fstat(file).st_size
    start = 8 + int.from_bytes(os.pread(file, 8, 0), "little")
    if not 8 < start <= size:
        raise ValueError("it has no safetensors header")
    header = os.pread(file, start - 8, 8)
    yield size.to_bytes(8, "little") + header
    entries = json.loads(header)
    if not isinstance(entries, dict):
        raise ValueError("its safetensors header is not a mapping")
    places = [entry["data_offsets"] for name, entry in sorted(entries.items()) if name != "__metadata__"]
    middles = [(start + begin + max(0, end - begin - _SAMPLE) // 2, min(_SAMPLE, end - begin)) for begin, end in places]
    with ThreadPoolExecutor(_AT_ONCE) as readers:
        yield from readers.map(os.pread, repeat(file), [n for _, n in middles], [offset for offset, _ in middles])
