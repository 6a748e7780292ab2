"""Tar shards: samples are found in place, in every layout that is written, and torn shards are refused."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

from evs_train.data.manifest import Samples, fingerprint, read_data
from evs_train.data.sources import TarMember, read_bytes
from evs_train.data_config import DataSection
from evs_train.errors import DataError, MediaError

TALK = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "This."}]


def shard(path: Path, members: dict[str, bytes], tar_format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def row(**fields: Any) -> bytes:
    return json.dumps({"conversations": TALK, **fields}).encode()


def read(path: Path, **options: Any) -> Samples:
    return read_data(DataSection(rows=[str(path)], **options)).samples


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_read_in_place(tmp_path: Path, tar_format: int) -> None:
    long = "folder/" * 20 + "größe.x"
    key = "a" if tar_format == tarfile.USTAR_FORMAT else long.removesuffix(".x")
    members = {
        f"{key}.mp4": b"first clip" * 100,
        f"{key}.json": row(id="one", video="where/it/was.mp4"),
        "b.mp4": b"second clip",
        "b.json": row(),
    }
    path = shard(tmp_path / "000.tar", members, tar_format)
    first, second = read(path)
    assert [read_bytes(member) for member in (first.videos[0], second.videos[0]) if isinstance(member, TarMember)] == [
        b"first clip" * 100,
        b"second clip",
    ]
    assert first.id == "one"
    assert second.id == "000.tar:b"
    assert second.source == f"{path} row b"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["000.tar"]


def test_samples_of_every_layout(tmp_path: Path) -> None:
    two = [{"from": "human", "value": "<video><video><image>Same?"}, {"from": "gpt", "value": "No."}]
    parts = [{"type": "video_url", "video_url": {"url": "c.right.mp4"}}, {"type": "image", "image": "c.jpg"}]
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Yes."}]
    members = {
        "a.0.mp4": b"a0",
        "a.1.mp4": b"a1",
        "a.jpg": b"aj",
        "a.json": json.dumps({"videos": ["a.1.mp4", "a.0.mp4"], "image": "a.jpg", "conversations": two}).encode(),
        "b.webm": b"bw",
        "b.thumb.png": b"bt",
        "b.json": row(video="b.webm"),
        "c.left.mp4": b"cl",
        "c.right.mp4": b"cr",
        "c.jpg": b"cj",
        "c.json": json.dumps({"messages": talk}).encode(),
        "dir/d.MP4": b"dm",
        "dir/d.txt": "Eine Tür geht auf.".encode(),
        "dir/d.json": b'{"key": "d", "status": "success", "video": "https://example.org/d"}',
        "dir/e.mp4": b"em",
        "dir/e.json": b'{"caption": "A cat comes in."}',
        "f.mp4": b"fm",
        "f.json": json.dumps({"QA": [{"i": "", "q": "What?", "a": "A cat."}]}).encode(),
    }
    samples = read(shard(tmp_path / "s.tar", members))
    found = [
        [read_bytes(member) for member in (*sample.videos, *sample.images) if isinstance(member, TarMember)]
        for sample in samples
    ]
    assert found == [[b"a1", b"a0", b"aj"], [b"bw"], [b"cr", b"cj"], [b"dm"], [b"em"], [b"fm"]]
    assert samples[3].messages[1]["content"][0]["text"] == "Eine Tür geht auf."
    assert samples[4].messages[1]["content"][0]["text"] == "A cat comes in."


def test_a_sample_that_makes_no_row_is_told_by_its_key(tmp_path: Path) -> None:
    members = {
        "a.mp4": b"x",
        "a.json": b'{"url": "x"}',
        "b.mp4": b"x",
        "c.json": b"{",
        "d.json": b"[]",
        "e.json": row(),
        "f.mp4": b"",
        "f.json": row(),
    }
    with pytest.raises(DataError) as caught:
        read(shard(tmp_path / "s.tar", members))
    lines = caught.value.message.splitlines()[1:]
    for line, message in zip(
        lines,
        [
            "s.tar row a: the row has no .*; its keys: url",
            "s.tar row b: the row has no .*; its keys: none",
            "s.tar row c: its .json or .txt cannot be read",
            "s.tar row d: its .json is not an object",
            "s.tar row e: 1 <video> placeholder",
            "s.tar row f: .*f.mp4 is empty",
        ],
        strict=True,
    ):
        assert re.search(message, line), line


def test_links_and_repeated_names_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "l.tar", "w") as tar:
        link = tarfile.TarInfo("a.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DataError, match=r"l\.tar row a: a\.mp4: not a plain member"):
        read(tmp_path / "l.tar")
    with tarfile.open(tmp_path / "r.tar", "w") as tar:
        for content in (row(), row()):
            info = tarfile.TarInfo("a.json")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(DataError, match=r"r\.tar row a: two members have the same name"):
        read(tmp_path / "r.tar")


def test_compressed_shards_are_refused_whatever_their_name(tmp_path: Path) -> None:
    plain = shard(tmp_path / "s.tar", {"a.mp4": b"x", "a.json": row()}).read_bytes()
    for name, content, message in (
        ("a.tar.gz", gzip.compress(plain), r"a\.tar\.gz: a compressed file .*to a\.tar"),
        ("b.tgz", gzip.compress(plain), r"b\.tgz: a compressed file"),
        ("c.tar", gzip.compress(plain), r"c\.tar: a tar file compressed with gzip"),
        ("d.tar", bz2.compress(plain), r"d\.tar: a tar file compressed with bzip2"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            read(tmp_path / name)


def test_torn_shards_are_refused(tmp_path: Path) -> None:
    members = {
        f"{key}{suffix}": content for key in "abc" for suffix, content in ((".mp4", b"x" * 600), (".json", row()))
    }
    whole = shard(tmp_path / "s.tar", members).read_bytes()
    sample = 512 + 1024 + 512 + 512
    assert whole[sample : sample + 5] == b"b.mp4"
    damaged = bytearray(whole)
    damaged[2 * sample : 2 * sample + 512] = b"\xff" * 512
    for name, content in {
        "between": whole[: 2 * sample],
        "header": whole[: sample + 100],
        "data": whole[: sample + 700],
        "damaged": bytes(damaged),
        "garbage": b"nonsense" * 200,
    }.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}\.tar: (the shard is cut off or damaged|not a whole tar file)"):
            read(tmp_path / f"{name}.tar")
    assert len(read(tmp_path / "s.tar")) == 3


def test_folders_in_a_shard_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(b"x")
    (tmp_path / "in" / "a.json").write_bytes(row())
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in (".", "in", "in/a.json", "in/a.mp4", "in"):
            tar.add(tmp_path / name, arcname=name, recursive=False)
    assert len(read(tmp_path / "s.tar")) == 1


def test_the_fingerprint_sees_a_members_size(tmp_path: Path) -> None:
    prints = [
        fingerprint(read(shard(tmp_path / name, {"a.mp4": clip, "a.json": row(id="x")})))
        for name, clip in (("s.tar", b"x"), ("t.tar", b"x"), ("u.tar", b"xx"))
    ]
    assert prints[0] == prints[1] != prints[2]


def test_an_empty_member_alone_is_a_media_error(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"s\.tar row a: .*a\.mp4 is empty"):
        read(shard(tmp_path / "s.tar", {"a.mp4": b"", "a.json": row()}))
