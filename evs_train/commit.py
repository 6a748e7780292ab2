"""Checkpoints that are whole or not there: staged, synced, listed with their hashes, and named by one rename.

How one is saved: the first process draws the name of a staging folder and tells the others; all write into it; each
syncs what it sees there and hashes its share; when all are done the first one writes `manifest.json` (size and SHA-256
of every file), renames the folder to `checkpoint-N` and syncs the folder above. What counts as a checkpoint is what
verifies against its manifest: names and dates are hints.

Invariant: a kill of any process, or of the machine, at any moment leaves every checkpoint that was there whole, and the
new one either whole or without the name of a checkpoint. All processes go on with the same outcome, or end.
Cost: every byte is read once after it was written, shared out over the processes; a resume reads its checkpoint once
more. Hashing takes about a second per 1.5 GB and process.
Asks of the file system: a rename of a folder that is atomic, and a sync of folders. Mounted object stores have neither.
This module knows nothing of models: others write what is in a checkpoint.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from evs_train.disk import Entry, Stamp, entry_of, stamps_of, sync, sync_all, with_failure_named, write_synced
from evs_train.errors import StorageError

MANIFEST = "manifest.json"
_STAGING, _REMOVED = ".staging-", ".removed-"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_FEWEST = 2
"""Checkpoints that stay whatever is asked for: the newest may turn out damaged when it is needed."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Ranks:
    """The processes that save together. `gather` joins the lists that all of them hand it, and is a barrier."""

    rank: int = 0
    world: int = 1
    gather: Callable[[list[Any]], list[Any]] = list


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint, and why each newer one is not whole, by name."""

    path: Path | None
    broken: dict[str, str]


class Checkpoints:
    """The checkpoints in one folder. Every process calls each method, in the same order."""

    def __init__(self, output: Path, ranks: Ranks | None = None) -> None:
        self.output = output
        self.ranks = ranks or Ranks()
        self._first = self.ranks.rank == 0
        self._known: dict[str, dict[str, Stamp]] = {}  # on the first process: what was hashed, as it was then

    def save(self, name: str, step: int, write: Callable[[Path], None]) -> None:
        """Commit the folder `name` of `output`, made after optimizer step `step`.

        Args:
            write: called on every process with the staging folder; it fills its subfolder `name`. It may wait for other
                processes, as DeepSpeed does, so where it fails on one, that one leaves, and torchrun ends the others.

        Raises:
            StorageError: the disk is full or refuses; says how many bytes are free. Nothing is left of the attempt.
        """
        (token,) = self.ranks.gather([secrets.token_hex(4)] if self._first else [])
        staging = self.output / f"{_STAGING}{name}-{token}"
        staged = staging / name
        try:
            with_failure_named(lambda: write(staging), staging)
            self.ranks.gather([None])  # all have written: what another one still writes has names that do not stay
            listed = self._together(lambda: sync_all(staged), staging)
            sizes = {file: size for of_rank in listed for file, size in of_rank.items()}
            mine = _shares([list(of_rank) for of_rank in listed], sizes)[self.ranks.rank]
            hashed = self._together(lambda: {file: entry_of(staged / file) for file in mine}, staging)
            entries = {file: entry for of_rank in hashed for file, entry in of_rank.items()}
            self._together(lambda: self._publish(staged, step, entries) if self._first else None, staging)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise

    def newest_whole(self) -> Found:
        """The newest checkpoint that verifies; newer ones are reported, and left where they are."""
        broken: dict[str, str] = {}
        for name in self._names():
            fault = self.fault_of(name)
            if fault is None:
                return Found(self.output / name, broken)
            broken[name] = fault
        return Found(None, broken)

    def fault_of(self, name: str) -> str | None:
        """Why the folder `name` is not whole, or None if it is: it has the files of its manifest, as they were written.

        Files that were hashed before by these processes and not touched since are not hashed again.
        """
        folder = self.output / name
        fault: str | None = None
        entries: dict[str, Entry] = {}
        is_known = False
        if self._first:
            try:
                stamps = _files_of(folder)
                entries = _read_manifest(folder, stamps)
                is_known = self._known.get(name) == stamps
                self._known[name] = stamps
            except (OSError, ValueError) as error:
                fault = str(error)
        ((fault, entries, is_known),) = self.ranks.gather([(fault, entries, is_known)] if self._first else [])
        if fault is None and not is_known:
            sizes = {file: size for file, (size, _) in entries.items()}
            mine = _shares([list(entries)] * self.ranks.world, sizes)[self.ranks.rank]
            fault = next(iter(self.ranks.gather(_differing(folder, {file: entries[file] for file in mine}))), None)
        if fault is not None:
            self._known.pop(name, None)
        return fault

    def rotate(self, keep: int) -> None:
        """Remove what is older than the newest `keep` whole checkpoints (at least two).

        A folder without a manifest is not ours to remove.
        """
        names, num_whole = self._names(), 0
        for place, name in enumerate(names):
            num_whole += self.fault_of(name) is None
            if num_whole == max(keep, _FEWEST):
                older = [path for one in names[place + 1 :] if (path := self.output / one).joinpath(MANIFEST).exists()]
                self._together(partial(self._remove, older), self.output)
                return

    def clean(self) -> None:
        """Remove what kills left: staging folders, and checkpoints that were being removed. For one process alone."""
        for prefix in (_STAGING, _REMOVED):
            for folder in self.output.glob(f"{prefix}*"):
                shutil.rmtree(folder, ignore_errors=True)  # what cannot be removed has no name that counts

    def require_space(self, needed: int, what: str) -> None:
        """Refuse to begin with fewer than `needed` bytes free.

        Raises:
            StorageError: on every process; with path, needed and free bytes.
        """
        (free,) = self.ranks.gather([shutil.disk_usage(self.output).free] if self._first else [])
        if free < needed:
            raise StorageError(
                f"{self.output} has {free} bytes free, and {what} will take about {needed}",
                "make room, name another output_dir, or keep fewer checkpoints (train.keep_checkpoints)",
            )

    def _names(self) -> list[str]:
        """Folders that are called checkpoints, newest first, as the first process sees them."""
        names = [path.name for path in self.output.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
        names.sort(key=lambda name: int(name.rsplit("-", 1)[1]), reverse=True)
        return self.ranks.gather(names if self._first else [])

    def _publish(self, staged: Path, step: int, entries: dict[str, Entry]) -> None:
        """Write the manifest, and give the checkpoint its name."""
        target = self.output / staged.name
        stamps = _files_of(staged)
        manifest = {
            "step": step,
            "evs_train": importlib.metadata.version("evs-train"),
            "files": {file: {"size": size, "sha256": digest} for file, (size, digest) in sorted(entries.items())},
        }
        write_synced(staged / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        sync(staged)
        if target.exists():  # not whole: a run that goes on from it does not make it again
            self._remove([target])
        os.rename(staged, target)
        sync(self.output)
        self._known[target.name] = stamps
        shutil.rmtree(staged.parent)

    def _remove(self, folders: Sequence[Path]) -> None:
        """Take the names of checkpoints from folders before their files: a kill leaves none that looks whole."""
        for folder in folders if self._first else []:
            aside = self.output / f"{_REMOVED}{folder.name}-{secrets.token_hex(4)}"
            os.rename(folder, aside)
            sync(self.output)
            shutil.rmtree(aside, ignore_errors=True)  # what stays of it is removed when a run begins here

    def _together(self, action: Callable[[], _T], where: Path) -> list[_T]:
        """What `action` gives on each process; its failure on one is raised on all."""
        outcome: tuple[StorageError | None, Any]
        try:
            outcome = (None, with_failure_named(action, where))
        except StorageError as error:
            outcome = (error, None)
        outcomes = self.ranks.gather([outcome])
        for failure, _ in outcomes:
            if failure is not None:
                raise failure
        return [value for _, value in outcomes]


def _files_of(folder: Path) -> dict[str, Stamp]:
    return {name: stamp for name, stamp in stamps_of(folder).items() if name != MANIFEST}


def _shares(seen: Sequence[Sequence[str]], sizes: dict[str, int]) -> list[list[str]]:
    """Files for each process to hash: of those that it sees, about as many bytes for each."""
    shares: list[list[str]] = [[] for _ in seen]
    loads = [0] * len(seen)
    for file in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = min((rank for rank, files in enumerate(seen) if file in files), key=lambda rank: (loads[rank], rank))
        shares[rank].append(file)
        loads[rank] += sizes[file]
    return shares


def _read_manifest(folder: Path, stamps: dict[str, Stamp]) -> dict[str, Entry]:
    """The manifest of a folder that has the files which it lists, in their sizes.

    Raises:
        ValueError, OSError: it does not.
    """
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"it has no {MANIFEST}: it was not finished, or an older version wrote it")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        step = int(manifest["step"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its {MANIFEST} is damaged: {error}") from error
    named = _CHECKPOINT.fullmatch(folder.name)
    if named and int(named[1]) != step:
        raise ValueError(f"its {MANIFEST} is of step {step}")
    if missing := sorted(entries.keys() - stamps.keys()):
        raise ValueError(f"{missing[0]} is missing")
    if unlisted := sorted(stamps.keys() - entries.keys()):
        raise ValueError(f"{unlisted[0]} is not listed in its {MANIFEST}")
    for name, (size, _) in entries.items():
        if stamps[name][0] != size:
            raise ValueError(f"{name} has {stamps[name][0]} bytes instead of {size}")
    return entries


def _differing(folder: Path, entries: dict[str, Entry]) -> list[str]:
    """Which files are not what was written, in words."""
    found = []
    for name, entry in entries.items():
        try:
            if entry_of(folder / name) != entry:
                found.append(f"{name} is not what was written: its SHA-256 differs")
        except OSError as error:
            found.append(f"{name} cannot be read: {error.strerror}")
    return found
