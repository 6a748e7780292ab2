"""Files and members of shards as decoders open them, and what is wrong with those they cannot open.

Invariant: only regular, readable files with something in them are opened, so that no FIFO or device can block.
Cost: one `stat` and one `open` for each. Runs in the decoding child, as a file system can hang, too.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from evs_train.data.sources import TarMember, name_of
from evs_train.errors import MediaError, Reason

_ISO_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp")  # one of them comes first in mp4 and mov
_MAGIC = (b"\x1aE\xdf\xa3", b"RIFF", b"FLV\x01", b"OggS", b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3", b"\x30\x26\xb2\x75")


@dataclass(frozen=True)
class MediaFile:
    """One state of a file, or of a member of a shard: `size` bytes at `offset` of `path`."""

    name: str
    path: str
    offset: int
    size: int
    mtime_ns: int
    is_member: bool

    def open(self) -> BinaryIO:
        """Its bytes; a member's are read into memory."""
        file = Path(self.path).open("rb")  # noqa: SIM115 (the caller closes it)
        if not self.is_member:
            return file
        with file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))

    def for_decoder(self) -> str | BinaryIO:
        """What FFmpeg opens: the path, where there is one."""
        return self.open() if self.is_member else self.path


def locate(source: str | TarMember, kind: str) -> MediaFile:
    """Look a source up.

    Raises:
        MediaError: missing, not a file, no permission, empty, or (a shard) truncated.
    """
    name, path = name_of(source), source.shard if isinstance(source, TarMember) else source
    try:
        info = os.stat(path)
        if stat.S_ISREG(info.st_mode):
            os.close(os.open(path, os.O_RDONLY))
    except OSError as error:
        raise unreadable(name, kind, error) from error
    if not stat.S_ISREG(info.st_mode):
        raise MediaError(f"{name}: not a file", f"name one {kind} file", "not a file")
    if isinstance(source, TarMember):
        if source.offset + source.size > info.st_size:
            raise MediaError(f"{name}: the shard ends within it", "copy the shard again", "truncated")
        file = MediaFile(name, path, source.offset, source.size, info.st_mtime_ns, is_member=True)
    else:
        file = MediaFile(name, path, 0, info.st_size, info.st_mtime_ns, is_member=False)
    if file.size == 0:
        raise MediaError(f"{name}: {kind} file is empty", "copy it again, or remove its rows", "empty")
    return file


def unreadable(name: str, kind: str, error: OSError) -> MediaError:
    """The named reason for which the operating system does not give a file."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
        return MediaError(f"{name}: {kind} file not found", "check the path in the row and data.media_root", "missing")
    reason: Reason = "no permission" if error.errno in (errno.EACCES, errno.EPERM) else "undecodable"
    return MediaError(f"{name}: {kind} file cannot be read: {error.strerror}", "check who may read it", reason)


def damage_of(file: MediaFile, *, is_video: bool = False) -> Reason:
    """Why a decoder fails on a file: it is no video (unless `is_video`), it ends too early, or it is damaged."""
    with file.open() as data:
        head = data.read(12)
        if head[4:8] in _ISO_BOXES:
            return "damaged" if _has_whole_boxes(data, file.size) else "truncated"
        if head[:4] == b"RIFF" and int.from_bytes(head[4:8], "little") + 8 > file.size:
            return "truncated"
        is_transport_stream = head[:1] == b"G" and data.seek(188) and data.read(1) == b"G"
        return "damaged" if is_video or head.startswith(_MAGIC) or is_transport_stream else "not a video"


def _has_whole_boxes(data: BinaryIO, size: int) -> bool:
    """Whether the boxes of an mp4 or mov file (ISO 14496-12, 4.2) end where the file does, with an index among them."""
    position, kinds = 0, set[bytes]()
    while position < size:
        data.seek(position)
        head = data.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        elif length == 0:  # to the end of the file
            length = size - position
        if len(head) < 8 or position + length > size:
            return False
        if length < 8:  # no box has so few: what follows is no list of boxes
            return True
        kinds.add(head[4:8])
        position += length
    return b"moov" in kinds
