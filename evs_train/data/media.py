"""What names a medium in a row to the source of its bytes, checked to be there.

Invariant: a source is local, exists, and lies in `data.media_root` where that is set, links followed: a row of a
downloaded data set cannot reach for other files of the machine. Nothing is opened.
Cost: one look-up a file; where a root is set, one for each folder on the way as well. Not here: whether a file can be
decoded, and media in the cells of tables. What becomes a link after it was looked up is followed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from evs_train.data.formats import kind_of
from evs_train.data.sources import FrameList, Source, TarMember, frame_files, name_of
from evs_train.errors import DataError, MediaError


@dataclass(frozen=True)
class MediaFinder:
    """Finds the media that a row names.

    Args:
        root: folder that relative paths start at.
        confined: whether media must lie in it, links followed.
        frames_fps: frames per second of videos that are folders or lists of frames.
    """

    root: str
    confined: bool = False
    frames_fps: float | None = None

    def video(self, value: Any) -> Source:
        """The source of a video that is named by a path, a list of paths of frames, or a tar member.

        Raises:
            DataError: what names it is no such thing, leaves the root, or is frames of an unknown rate.
            MediaError: a file is missing, a folder without frames, a member empty.
        """
        if isinstance(value, TarMember):
            return _not_empty(value)
        if isinstance(value, list):
            if not value:
                raise DataError("a video is an empty list", "name its frames, or remove the row")
            return FrameList(tuple(self._file(frame, "frame") for frame in value), self._fps())
        path = self._path(value, "video")
        if not os.path.isdir(path):
            return self._file(value, "video")
        frames = frame_files(path)
        for frame in filter(os.path.islink, frames):
            self._confine(value, frame, "frame")
        if not frames:
            raise MediaError(f"no frames in the folder {path}", "it must hold .jpg, .png or the like", "no frames")
        self._fps()
        return path

    def image(self, value: Any) -> str | TarMember:
        """The source of an image. Raises as `video`."""
        return _not_empty(value) if isinstance(value, TarMember) else self._file(value, "image")

    def _fps(self) -> float:
        if self.frames_fps is None:
            raise DataError(
                "a video is given as frames, but not how many make a second",
                "set data.frames_fps to the rate that they were extracted at",
            )
        return self.frames_fps

    def _file(self, value: Any, kind: str) -> str:
        path = self._path(value, kind)
        if not os.path.isfile(path):
            raise MediaError(f"{kind} file not found: {path}", "check the path and data.media_root", "missing")
        return path

    def _path(self, value: Any, kind: str) -> str:
        name = _stored_path(value, kind).removeprefix("file://")
        if "\0" in name:
            raise DataError(f"{kind} {name[:80]!r} is no path", "it must be the path of a file")
        if "://" in name or name.startswith("data:"):
            raise DataError(f"{kind} {name[:80]!r} is not a local file", "download it, and give its path")
        path = str(Path(self.root) / name)
        self._confine(name, path, kind)
        return path

    def _confine(self, name: str, path: str, kind: str) -> None:
        if self.confined and not lies_in(path, self.root):
            raise DataError(
                f"{kind} {name!r} lies outside data.media_root: {os.path.realpath(path)}",
                "data.allow_outside: true takes it",
            )


def lies_in(path: str, root: str) -> bool:
    """Whether a path lies in a folder, links followed."""
    return _real_folder(os.path.realpath(path)).startswith(_real_folder(_real(root)))


def _stored_path(value: Any, kind: str) -> str:
    """The path in a row; tables hold files as {"path", "bytes"}."""
    if isinstance(value, dict) and {"path", "bytes"} >= value.keys():
        if value.get("bytes") is not None:
            raise DataError(
                f"{_a(kind)} is embedded as bytes",
                "write it to a file or a tar shard, which are read without unpacking",
            )
        value = value.get("path")
    if not isinstance(value, str) or not value:
        raise DataError(f"{_a(kind)} is {kind_of(value)}", "it must be the path of a file")
    return value


def _a(kind: str) -> str:
    return f"an {kind}" if kind == "image" else f"a {kind}"


def _not_empty(member: TarMember) -> TarMember:
    if member.size == 0:
        raise MediaError(f"{name_of(member)} is empty", "write the shard again", "empty")
    return member


@lru_cache(maxsize=64)
def _real(path: str) -> str:
    return os.path.realpath(path)


def _real_folder(path: str) -> str:
    return path.rstrip(os.sep) + os.sep
