"""What frozen modules said of media, kept on disk: one file for each medium, sampling and state of the weights.

A folder under `path` belongs to one set of settings (`FeatureStore.of`): whatever makes other weights of what is
frozen, or makes it say something else of the same file, makes another folder. In it a file's name is the hash of the
medium: where it lies, its size and change time, how its frames are sampled, and which media stand beside it in its row,
since a processor may size them together. So an entry is never out of date, only unused.

Invariant: an entry is written whole or not at all, and counts only if its checksum holds; a damaged one is removed and
its medium computed again. All processes and runs that share `path` keep to `max_bytes` together. When it is full,
nothing more is written and nothing is thrown out: a run shows its rows in passes, each in another order, and a cache
that threw out its oldest entries for new ones would always lack what comes next.
Cost: one `stat` of each medium, one file read and its checksum (xxHash: GiB per second). No model is known here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from evs_train.data.chat import Kind
from evs_train.data.index import Facts, key_of, state_of
from evs_train.data.manifest import Sample
from evs_train.data.sampling import FrameSampling
from evs_train.data.video import absolute
from evs_train.redaction import redact

Keys = dict[Kind, list[str]]
"""Names of the entries of a row's media, by kind and in reading order."""
PIECES: dict[Kind, str] = {"image": "image_pieces", "video": "video_pieces"}
"""Where the encoder inputs of a batch (`Media`) have a `Piece` for each medium."""
Piece = dict[str, Any]
"""One medium on its way to the device: `key`, and `outputs` (what the tower said), or else `inputs` (what it takes),
and `facts`. A plain mapping, since loaders pin and move what is in those."""
_DRAFT = "draft"
_STALE_SECONDS = 3600.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stored:
    """One entry: what was said of a medium, and what is known of the medium, which then need not be decoded."""

    outputs: list[Tensor]
    facts: Facts


@dataclass(frozen=True)
class FeatureStore:
    """Entries of one set of settings. Holds no open file, so that the loader's processes can have copies of it.

    Attributes:
        path: what all settings share: a folder for each of them, and `size`, the bytes in all of them.
        settings: name of the folder of these settings.
        max_bytes: of all entries under `path`.
    """

    path: Path
    settings: str
    max_bytes: int

    @classmethod
    def of(cls, path: Path, max_bytes: int, settings: Mapping[str, Any]) -> FeatureStore:
        """The store of these settings: its folder is made, and one process of each node counts what is there.

        Raises:
            OSError: `path` cannot be written.
        """
        text = json.dumps(settings, sort_keys=True, indent=1)
        store = cls(path, _hash(text), max_bytes)
        store.folder.mkdir(parents=True, exist_ok=True)
        (store.folder / "settings.json").write_text(text + "\n", encoding="utf-8")
        if os.environ.get("LOCAL_RANK", "0") == "0":
            store._recount()
        return store

    @property
    def folder(self) -> Path:
        return self.path / self.settings

    def keys(self, sample: Sample, sampling: FrameSampling) -> Keys | None:
        """Names of the entries of a row's media in their present state; None if one of the media is not there."""
        of_kind: dict[Kind, list[list[Any]]] = {
            "video": [[key_of(absolute(source)), state_of(source), str(sampling)] for source in sample.videos],
            "image": [[key_of(absolute(source)), state_of(source)] for source in sample.images],
        }
        if any(medium[1] is None for media in of_kind.values() for medium in media):
            return None
        return {
            kind: [
                _hash(json.dumps([kind, medium, *([place, media] if len(media) > 1 else [])]))
                for place, medium in enumerate(media)
            ]
            for kind, media in of_kind.items()
        }

    def has(self, key: str) -> bool:
        return self._file(key).exists()

    def find(self, keys: Keys) -> dict[Kind, list[Stored]] | None:
        """The entries of a row's media, or None if one of them is missing."""
        if not all(self.has(key) for of_kind in keys.values() for key in of_kind):
            return None
        found: dict[Kind, list[Stored]] = {}
        for kind, of_kind in keys.items():
            entries = [self.read(key) for key in of_kind]
            found[kind] = [entry for entry in entries if entry is not None]
            if len(found[kind]) < len(of_kind):
                return None
        return found

    def read(self, key: str) -> Stored | None:
        """An entry; None where there is none, or only a damaged one, which is removed."""
        path = self._file(key)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                tensors = [file.get_tensor(str(number)) for number in range(len(file.keys()))]
            if metadata["checksum"] == _checksum(metadata["about"], tensors):
                about = json.loads(metadata["about"])
                orders = zip(tensors, about["orders"], strict=True)
                return Stored([one.permute(inverse(order)) for one, order in orders], Facts(**about["facts"]))
            reason = "its checksum does not hold"
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            reason = str(error)
        _log.warning("%s is removed and computed again: %s", redact(str(path)), redact(reason))
        with contextlib.suppress(OSError), self._locked():
            size = path.stat().st_size
            path.unlink()
            self._set_size(self._size() - size)
        return None

    def write(self, key: str, stored: Stored) -> int | None:
        """Keep an entry, unless it is there. Its outputs are dense tensors on the host.

        Returns:
            Its bytes on disk, 0 if it was there already, or None if it does not fit any more.

        Raises:
            OSError: it could not be written.
        """
        path = self._file(key)
        orders = [memory_order(one) for one in stored.outputs]
        tensors = [one.permute(order).contiguous() for one, order in zip(stored.outputs, orders, strict=True)]
        about = json.dumps({"orders": orders, "facts": asdict(stored.facts)})
        path.parent.mkdir(exist_ok=True)
        draft = path.with_suffix(f".{_DRAFT}{os.getpid()}")
        try:
            named = {str(number): one for number, one in enumerate(tensors)}
            save_file(named, draft, {"about": about, "checksum": _checksum(about, tensors)})
            size = draft.stat().st_size
            with self._locked():
                total = self._size() + size
                if path.exists():  # another process was faster
                    return 0
                if total > self.max_bytes:
                    return None
                os.replace(draft, path)
                self._set_size(total)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        finally:
            draft.unlink(missing_ok=True)
        return size

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _locked(self) -> FileLock:
        return FileLock(self.path / "lock")

    def _size(self) -> int:
        return int((self.path / "size").read_text(encoding="ascii"))

    def _set_size(self, size: int) -> None:
        draft = self.path / f"size.{_DRAFT}"
        draft.write_text(str(size), encoding="ascii")
        os.replace(draft, self.path / "size")

    def _recount(self) -> None:
        """Count all entries, since files may have been deleted by hand; drafts that a killed process left go."""
        with self._locked():
            size = 0
            for file in self.path.glob("*/*/*"):
                with contextlib.suppress(FileNotFoundError):  # a draft that was done meanwhile
                    state = file.stat()
                    if file.suffix == ".safetensors":
                        size += state.st_size
                    elif file.suffix.startswith(f".{_DRAFT}") and time.time() - state.st_mtime > _STALE_SECONDS:
                        file.unlink()
            self._set_size(size)


def _hash(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())


def _checksum(about: str, tensors: Sequence[Tensor]) -> str:
    digest = xxhash.xxh3_128(about.encode())
    for one in tensors:
        digest.update(f"{one.dtype} {tuple(one.shape)}".encode())
        digest.update(one.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def memory_order(tensor: Tensor) -> list[int]:
    """The permutation that makes a dense tensor contiguous, where its first dimension is the outermost in memory."""
    return [0, *sorted(range(1, tensor.ndim), key=tensor.stride, reverse=True)]


def inverse(order: Sequence[int]) -> list[int]:
    """The permutation that undoes `order`."""
    return [list(order).index(dim) for dim in range(len(order))]
