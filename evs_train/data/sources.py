"""Where a video's or image's bytes are: a file, a folder or list of frame images, or a member of a tar shard.

Invariant: a source names bytes on a local disk and nothing else; its text (`name_of`) is what errors and records show.
Cost: nothing is opened here but what `read_bytes` is asked for; `frame_files` lists one folder.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

FRAME_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
"""Files of a folder that are frames; others (a caption, a thumbnail index) are not."""


@dataclass(frozen=True)
class TarMember:
    """An uncompressed member of a tar file: `size` bytes at `offset`, so it is read without unpacking the shard."""

    shard: str
    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class FrameList:
    """Images that are the frames of one video, in order, `fps` of them per second of video time."""

    paths: tuple[str, ...]
    fps: float


Source = str | TarMember | FrameList
"""A video: a path (a file, or a folder of frame images), a tar member or a list of frames. An image: path or member."""


def name_of(source: Source) -> str:
    """What a person calls the source: a path, `shard.tar/member`, or the first of its frames and how many there are."""
    if isinstance(source, TarMember):
        return f"{source.shard}/{source.name}"
    if isinstance(source, FrameList):
        return f"{source.paths[0]} and {len(source.paths) - 1} more frames" if source.paths else "a list of no frames"
    return source


def read_bytes(source: str | TarMember) -> bytes:
    """All bytes of a file or member. Raises OSError."""
    if isinstance(source, str):
        return Path(source).read_bytes()
    with Path(source.shard).open("rb") as shard:
        shard.seek(source.offset)
        return shard.read(source.size)


def frame_files(folder: str | Path) -> list[str]:
    """The frames in a folder in natural order, so that frame_10 comes after frame_9. Raises OSError."""
    names = [
        entry.name
        for entry in os.scandir(folder)
        if not entry.name.startswith(".") and Path(entry.name).suffix.lower() in FRAME_SUFFIXES
    ]
    return [os.path.join(folder, name) for name in sorted(names, key=_natural)]


def _natural(name: str) -> tuple[list[tuple[bool, int, str]], str]:
    """Digits compare as numbers, and before letters; equal but for zeros ("1", "01") compares as text."""
    pieces = re.split(r"([0-9]+)", name)
    return [
        (not piece.isdecimal(), int(piece) if piece.isdecimal() else 0, piece.lower() if not piece.isdecimal() else "")
        for piece in pieces
        if piece
    ], name
