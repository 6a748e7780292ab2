"""Where a video's or image's bytes are: a file, a folder or list of frame images, or a member of a tar shard.

Invariant: a source names bytes on a local disk and nothing else; its text (`name_of`) is what errors and records show.
Cost: none; nothing is opened here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
