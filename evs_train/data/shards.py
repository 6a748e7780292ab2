"""Tar shards of samples (WebDataset): each sample to a row whose media are places in the shard.

Members that stand together and share a key, the name up to the first dot of its last part, are a sample (webdataset,
`tariterators.base_plus_ext` and the WebDataset page of torchdata, read). Its row is `key.json` where that holds a
conversation, else its media with the caption of `key.txt` or of "caption" in `key.json`, as video2dataset and
img2dataset write them.

Invariant: a medium is told as shard, offset and size from the tar's own headers, within the file; nothing is unpacked.
A shard that is compressed, cut off or damaged is refused, where `tarfile` would end early without a word.
Cost: one header for each member, and the texts; media are skipped over. Not here: shards on a server, sparse members,
links.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from evs_train.data.formats import MEDIA, listed
from evs_train.data.sources import FRAME_SUFFIXES, TarMember
from evs_train.errors import DataError
from evs_train.strict import read_json

VIDEO_SUFFIXES = frozenset({".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv"})
_BLOCK = tarfile.BLOCKSIZE
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

Row = dict[str, Any]


def read_shard(path: Path) -> Iterator[tuple[str, Any]]:
    """(key, row) of each sample; a sample that makes no row comes as a `DataError` in its place.

    Raises:
        DataError: the shard is compressed, no tar file, or ends before its end mark.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(6)
    for magic, name in _MAGIC.items():
        if start.startswith(magic):
            raise DataError(f"{path}: a tar file compressed with {name}", "decompress it: members are read in place")
    try:
        with tarfile.open(path, "r:") as tar:
            files = (member for member in tar if not member.isdir())
            for key, group in groupby(files, key=lambda member: _split(member.name)[0]):
                yield key, _sample(path, tar, list(group))
            end = tar.offset
    except tarfile.TarError as error:
        raise DataError(f"{path}: not a whole tar file: {error}", "write or copy the shard again") from error
    with path.open("rb") as file:  # a tar file ends with empty blocks; tarfile takes anything unreadable for its end
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(f"{path}: the shard is cut off or damaged at byte {end}", "write or copy it again")


def _split(name: str) -> tuple[str, str]:
    """Key and suffix of a member: "a/b.seg.mp4" is ("a/b", ".seg.mp4")."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return folder + slash + stem, (dot + suffix).lower()


def _sample(path: Path, tar: tarfile.TarFile, members: list[tarfile.TarInfo]) -> Row | DataError:
    by_suffix = {_split(member.name)[1]: member for member in members}
    for member in members:
        if not member.isreg() or member.issparse():
            return DataError(f"{member.name}: not a plain member", "write the shard without links and sparse files")
    if len(by_suffix) < len(members):
        return DataError("two members have the same name", "write the shard again, each key once")
    texts = {suffix: _read(tar, by_suffix[suffix]) for suffix in (".json", ".txt") if suffix in by_suffix}
    try:
        row = read_json(texts.get(".json", b"{}").decode("utf-8"))
        caption = texts.get(".txt", b"").decode("utf-8")
    except ValueError as error:
        return DataError(f"its .json or .txt cannot be read: {error}", "write the shard again")
    if not isinstance(row, dict):
        return DataError("its .json is not an object", "it must be one row, or the metadata of a caption")
    media = {
        "video": [_place(path, member) for suffix, member in by_suffix.items() if _ends(suffix) in VIDEO_SUFFIXES],
        "image": [_place(path, member) for suffix, member in by_suffix.items() if _ends(suffix) in FRAME_SUFFIXES],
    }
    if not any(key in row for key in ("conversations", "messages", "QA")):
        # Metadata may hold anything, "video" and "messages" of a crawler aside: only the caption of it is taken.
        return {"caption": caption or row.get("caption"), **media} if caption or "caption" in row else row
    return _with_members(row, media)


def _ends(suffix: str) -> str:
    return "." + suffix.rpartition(".")[2]


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # a regular member
    return file.read()


def _place(path: Path, member: tarfile.TarInfo) -> TarMember:
    return TarMember(str(path), member.name, member.offset_data, member.size)


def _with_members(row: Row, media: dict[str, list[TarMember]]) -> Row:
    """The row, with its media told as members of its sample where they are.

    By name, or where the row names one file and the sample has one member of that kind: shards often keep the name that
    the file had before. A row that names none takes all.
    """
    names = {name: member for kind in media.values() for member in kind for name in (member.name, _base(member.name))}
    if _name_parts(row, names):
        return row
    named = {kind: listed(row, kind) for kind in MEDIA}
    for kind, files in (named if any(named.values()) else media).items():
        told = media[kind] if len(files) == len(media[kind]) == 1 else files
        row.pop(f"{kind}s", None)
        row[kind] = [names.get(value, value) if isinstance(value, str) else value for value in told]
    return row


def _name_parts(row: Row, names: dict[str, TarMember]) -> bool:
    """Replace names of members in the parts of messages; whether any part names a file."""
    found = False
    turns = row.get("messages")
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    for part in (part for content in contents if isinstance(content, list) for part in content):
        for key in ("video", "image", "path", "url", "video_url", "image_url"):
            if isinstance(part, dict) and part.get(key):
                url = part[key]["url"] if isinstance(part[key], dict) and "url" in part[key] else part[key]
                part[key] = names.get(url, url) if isinstance(url, str) else url
                found = True
    return found


def _base(name: str) -> str:
    return name.rpartition("/")[2]
