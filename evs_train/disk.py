"""Files on disk: written so that a kill leaves the old one or the new one, synced, hashed; and a full disk in words.

Invariant: what `write_synced` and `sync_all` return from is on disk, and survives the machine. Cost: waiting for it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from evs_train.errors import StorageError

Stamp = tuple[int, int, int]
"""Of a file: its size, and when its content and its entry changed (ns). No program can put back the last one."""
Entry = tuple[int, str]
"""Of a file: its size and SHA-256."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_OF_TORCH = ("inline_container", "iostream", "PytorchStreamWriter", "Parent directory")
_T = TypeVar("_T")


def write_synced(path: Path, text: str) -> None:
    """Write a file and wait until it is on disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Give the file `path` a new content: whoever reads it after a kill finds the old one or the new one."""
    draft = path.with_name(path.name + ".draft")
    write_synced(draft, text)
    os.replace(draft, path)


def whole_lines(path: Path) -> list[str]:
    """Lines of a file that is appended to, each with its end; one that a kill cut short is left out."""
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_all(folder: Path) -> dict[str, int]:
    """Sync all files and folders in `folder`; sizes of the files by relative path.

    A sync reaches the disk from the machine that wrote, and which one that is, is not known. So every process syncs
    all that it sees, which costs nothing where it was done.
    """
    sizes = {name: stamp[0] for name, stamp in stamps_of(folder).items()}
    for name in sizes:
        sync(folder / name)
    for above, _, _ in os.walk(folder, topdown=False):
        sync(Path(above))
    return sizes


def entry_of(path: Path) -> Entry:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def stamps_of(folder: Path) -> dict[str, Stamp]:
    """All files in `folder` and below by relative path.

    Raises:
        ValueError: something there is a link or no file; what it leads to could change unseen.
    """
    stamps = {}
    for above, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(above) / name
            found = path.lstat()
            if stat.S_ISREG(found.st_mode):
                stamps[path.relative_to(folder).as_posix()] = (found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            elif not stat.S_ISDIR(found.st_mode):
                raise ValueError(f"{path} is not a regular file")
    return stamps


def with_failure_named(action: Callable[[], _T], where: Path) -> _T:
    """Do `action`, which writes to the folder `where`.

    Raises:
        StorageError: it could not; with the path and how many bytes are free. Of a full disk torch says only that a
            position or a stream is not as expected (seen with 2.15), and safetensors wraps the system's words. Where
            another process had no room and removed the folder, torch misses it.
    """
    try:
        return action()
    except (OSError, SafetensorError, RuntimeError) as error:
        of_torch = any(words in str(error) for words in _OF_TORCH)
        if isinstance(error, RuntimeError) and not of_torch:
            raise
        raise StorageError(
            f"{where} could not be written, with {_free(where)} bytes free there: {error}",
            "make room and go on with train.resume=auto; the checkpoints before this one are whole",
        ) from error


@contextlib.contextmanager
def full_disk_named(where: Path) -> Iterator[None]:
    """For all that is done inside, logs and exports among it: a full disk is no defect, wherever it is met.

    Args:
        where: the folder that is most likely on it.

    Raises:
        StorageError: a write was refused for lack of room, or of quota; with the bytes free in `where`.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _is_for_lack_of_room(error):
            raise
        raise StorageError(
            f"no room is left for a file, with {_free(where)} bytes free in {where}: {error}",
            "make room and give the same command again; a training goes on with train.resume=auto",
        ) from error


def _is_for_lack_of_room(error: OSError | SafetensorError) -> bool:
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM
    return any(f"(os error {number})" in str(error) for number in _NO_ROOM)  # as Rust writes it


def _free(where: Path) -> int:
    """Bytes free on the disk of `where`, or of the nearest folder above that is there."""
    return shutil.disk_usage(next(path for path in (where, *where.absolute().parents) if path.exists())).free
