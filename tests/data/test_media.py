"""Media that rows name: frames, folders, and files that lie where they should not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evs_train.data.manifest import Samples, fingerprint, read_data
from evs_train.data.sources import FrameList, frame_files, name_of
from evs_train.data_config import DataSection
from evs_train.errors import DataError, MediaError

ANSWER = {"role": "assistant", "content": "This."}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A media root with a clip and a folder of frames, and files outside it."""
    for name in (
        "root/a.mp4",
        "root/frames/f1.jpg",
        "root/frames/f10.jpg",
        "root/frames/f9.JPG",
        "out/b.mp4",
        "root2/c.mp4",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"not opened here")
    (tmp_path / "root" / "frames" / "caption.txt").write_text("no frame")
    (tmp_path / "root" / "frames" / ".f0.jpg").write_bytes(b"no frame")
    return tmp_path / "root"


def read(root: Path, video: Any, **options: Any) -> Samples:
    row = {"videos": [video], "messages": [{"role": "user", "content": "<video>What?"}, ANSWER]}
    (root / "rows.json").write_text(json.dumps([row]))
    return read_data(DataSection(rows=[str(root / "rows.json")], **options)).samples


def test_a_folder_of_frames_is_a_video(root: Path) -> None:
    [sample] = read(root, "frames", frames_fps=2.0)
    assert sample.videos == (str(root / "frames"),)
    assert [Path(path).name for path in frame_files(root / "frames")] == ["f1.jpg", "f9.JPG", "f10.jpg"]


def test_natural_order(tmp_path: Path) -> None:
    names = ["1.png", "01.png", "2.png", "10.png", "a1b2.png", "a1b10.png", "a2b1.png", "B1.png"]
    for name in reversed(names):
        (tmp_path / name).write_bytes(b"")
    assert [Path(path).name for path in frame_files(tmp_path)] == ["01.png", *names[:1], *names[2:]]


@pytest.mark.parametrize("video", ["frames", ["frames/f1.jpg"]])
def test_frames_of_an_unknown_rate_are_refused(root: Path, video: Any) -> None:
    with pytest.raises(DataError, match=r"row 1: a video is given as frames, .*data\.frames_fps"):
        read(root, video)


def test_frames_that_are_not_there(root: Path) -> None:
    (root / "empty").mkdir()
    (root / "empty" / "notes.txt").write_text("no frame")
    for options in ({"frames_fps": 1}, {}):  # their rate is asked for where there are some
        with pytest.raises(MediaError, match=r"row 1: no frames in the folder .*empty") as caught:
            read(root, "empty", **options)
        assert caught.value.reason == "no frames"
    with pytest.raises(MediaError, match=r"row 1: frame file not found: .*f2\.jpg"):
        read(root, ["frames/f1.jpg", "frames/f2.jpg"], frames_fps=1)
    with pytest.raises(DataError, match="a video is an empty list"):
        read(root, [], frames_fps=1)
    with pytest.raises(DataError, match="a frame is a number"):
        read(root, [3], frames_fps=1)


def test_a_folder_is_no_image(root: Path) -> None:
    row = {"images": ["frames"], "messages": [{"role": "user", "content": "<image>What?"}, ANSWER]}
    (root / "rows.json").write_text(json.dumps([row]))
    with pytest.raises(MediaError, match="image file not found"):
        read_data(DataSection(rows=[str(root / "rows.json")], frames_fps=1))


def test_the_fingerprint_sees_frames(root: Path) -> None:
    frames = ["frames/f1.jpg", "frames/f10.jpg"]
    samples = [read(root, "frames", frames_fps=1), read(root, frames, frames_fps=1)]
    prints = [fingerprint(s) for s in samples]
    (root / "frames" / "f10.jpg").write_bytes(b"another size")
    changed = [fingerprint(s) for s in samples]
    (root / "frames" / "f11.jpg").write_bytes(b"")
    assert len({*prints, *changed, fingerprint(samples[0])}) == 5


def test_lists_of_frames_have_a_name(root: Path) -> None:
    [sample] = read(root, ["frames/f1.jpg", "frames/f9.JPG"], frames_fps=1)
    assert isinstance(sample.videos[0], FrameList)
    assert name_of(sample.videos[0]) == f"{root / 'frames/f1.jpg'} and 1 more frames"


@pytest.mark.parametrize(
    "video", ["../out/b.mp4", "frames/../../out/b.mp4", "../root2/c.mp4", "link.mp4", "linked/b.mp4", "ABSOLUTE"]
)
def test_media_outside_the_root_are_refused(root: Path, video: str) -> None:
    (root / "link.mp4").symlink_to(root.parent / "out" / "b.mp4")
    (root / "linked").symlink_to(root.parent / "out")
    video = str(root.parent / "out" / "b.mp4") if video == "ABSOLUTE" else video
    with pytest.raises(DataError, match=r"rows\.json row 1: video '.*' lies outside data\.media_root: .*4") as caught:
        read(root, video, media_root=str(root))
    assert repr(video) in caught.value.message
    assert len(read(root, video, media_root=str(root), allow_outside=True)) == 1
    assert len(read(root, video)) == 1


def test_frames_outside_the_root_are_refused(root: Path) -> None:
    (root.parent / "out" / "1.jpg").write_bytes(b"x")
    for video in (["frames/f1.jpg", "../out/1.jpg"], "../out"):
        with pytest.raises(DataError, match=r"row 1: (frame|video) '\.\./out.* lies outside"):
            read(root, video, media_root=str(root), frames_fps=1)


def test_a_root_behind_a_link_is_a_root(root: Path) -> None:
    (root.parent / "alias").symlink_to(root)
    (root / "inner.mp4").symlink_to(root / "a.mp4")
    for video in ("a.mp4", "inner.mp4", "frames/../a.mp4", str(root / "a.mp4")):
        assert len(read(root, video, media_root=str(root.parent / "alias"))) == 1
    assert len(read(root, "a.mp4", media_root="/" + str(root).lstrip("/") + "/")) == 1
