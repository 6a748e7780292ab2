"""Videos and images that are not plain files: members of tar shards, lists and folders of frames."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evs_train.data.decoding import Decoding
from evs_train.data.sampling import FrameSampling
from evs_train.data.sources import FrameList, TarMember
from evs_train.data.video import read_image, read_video, video_metadata
from evs_train.errors import MediaError
from tests.data.test_video import VIDEOS, recorded, write_video

FOUR = FrameSampling(num_frames=4)


def member(shard: Path, name: str) -> TarMember:
    with tarfile.open(shard) as tar:
        info = tar.getmember(name)
        return TarMember(str(shard), name, info.offset_data, info.size)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    write_video(tmp_path / "clip.mp4", range(0, 4000, 100))
    write_video(tmp_path / "other.mp4", range(0, 700, 100))
    Image.new("RGB", (30, 20), (200, 10, 10)).save(tmp_path / "picture.png")
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mp4").touch()
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("other.mp4", "clip.mp4", "picture.png", "text.mp4", "empty.mp4"):
            tar.add(tmp_path / name, name)
    return path


@pytest.mark.parametrize("backend", ["decord", "pyav"])
def test_members_are_read_as_files_are(shard: Path, backend: str) -> None:
    decoding = Decoding(backend=backend)  # type: ignore[arg-type]
    for name in ("clip.mp4", "other.mp4"):
        packed = read_video(member(shard, name), FOUR, decoding=decoding)
        plain = read_video(shard.parent / name, FOUR, decoding=decoding)
        assert np.array_equal(packed.frames, plain.frames)
        assert np.array_equal(packed.timestamps, plain.timestamps)
        assert (packed.total_frames, packed.backend) == (plain.total_frames, backend)
        assert packed.path == f"{shard}/{name}"


def test_image_members(shard: Path) -> None:
    assert read_image(member(shard, "picture.png")).getpixel((3, 3)) == (200, 10, 10)


def test_bad_members_are_named(shard: Path) -> None:
    clip = member(shard, "clip.mp4")
    beyond = TarMember(clip.shard, clip.name, clip.offset, 10_000_000)
    shifted = TarMember(clip.shard, clip.name, clip.offset + 512, clip.size)
    cut = TarMember(clip.shard, clip.name, clip.offset, clip.size - 2000)
    gone = TarMember(str(shard) + "x", clip.name, clip.offset, clip.size)
    for source, reason in [
        (member(shard, "text.mp4"), "not a video"),
        (member(shard, "empty.mp4"), "empty"),
        (beyond, "truncated"),
        (shifted, "not a video"),
        (cut, "truncated"),
        (gone, "missing"),
    ]:
        with pytest.raises(MediaError) as caught:
            read_video(source, FOUR)
        assert caught.value.reason == reason
        assert f"{source.shard}/{source.name}" in caught.value.message


def write_frames(folder: Path, count: int, size: tuple[int, int] = (40, 30)) -> list[str]:
    """Frame i is grey, 10 i; named without leading zeros, so that text order is not their order."""
    folder.mkdir()
    names = [folder / f"frame {index}.png" for index in range(count)]
    for index, name in enumerate(names):
        Image.new("RGB", size, (10 * index,) * 3).save(name)
    return [str(name) for name in names]


def test_a_list_of_frames(tmp_path: Path) -> None:
    paths = write_frames(tmp_path / "frames", 12)
    clip = read_video(FrameList(tuple(paths), 4.0), FrameSampling(fps=2))
    assert clip.frame_indices == [0, 2, 4, 6, 8, 10]
    assert clip.timestamps.tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
    assert clip.frames[:, 0, 0, 0].tolist() == [0, 20, 40, 60, 80, 100]
    assert (clip.total_frames, clip.fps, clip.duration, clip.backend) == (12, 4.0, 3.0, "images")
    metadata = video_metadata(clip)
    assert (metadata.fps, metadata.frames_indices) == (4.0, clip.frame_indices)


def test_a_folder_of_frames_in_natural_order(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    paths = write_frames(folder, 12)
    (folder / "Thumbs.db").write_text("no frame")
    clip = read_video(folder, FrameSampling(num_frames=12), decoding=Decoding(frames_fps=4.0))
    assert clip.frames[:, 0, 0, 0].tolist() == [10 * index for index in range(12)]
    assert np.array_equal(clip.frames, read_video(FrameList(tuple(paths), 4.0), FrameSampling(num_frames=12)).frames)
    with pytest.raises(MediaError, match=r"frames_fps") as caught:
        read_video(folder, FOUR)
    assert caught.value.reason == "no timestamps"


def test_bad_frames_are_refused(tmp_path: Path) -> None:
    paths = write_frames(tmp_path / "frames", 12)
    for place, reason in [(0, "damaged"), (3, "damaged"), (5, "not an image"), (6, "missing")]:
        spoilt = list(paths)
        spoilt[place] = str(tmp_path / f"{place}.png")
        if reason == "damaged":
            Image.new("RGB", (41, 30)).save(spoilt[place])
        elif place == 5:
            Path(spoilt[5]).write_text("text")
        with pytest.raises(MediaError) as caught:
            read_video(FrameList(tuple(spoilt), 4.0), FOUR)  # samples 0, 4, 7 and 11
        assert caught.value.reason == reason
    other_size = [*paths[:11], str(tmp_path / "3.png")]
    with pytest.raises(MediaError, match="differ in size"):
        read_video(FrameList(tuple(other_size), 4.0), FOUR, verify=False)
    with pytest.raises(MediaError) as caught:
        read_video(FrameList((), 4.0), FOUR)
    assert caught.value.reason == "no frames"
    with pytest.raises(MediaError) as caught:
        read_video(FrameList(tuple(paths), 4.0), FOUR, decoding=Decoding(max_frames=11))
    assert caught.value.reason == "too long"


def test_relative_paths_follow_the_parents_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        write_video(Path("clip.mp4"), range(0, 300 if name == "one" else 500, 100))
        assert read_video("clip.mp4", FOUR).total_frames == (3 if name == "one" else 5)


@recorded
@pytest.mark.parametrize("name", ["flipping_a_pancake.mkv", "nasa_13013.mp4", "av1_video.mkv", "video_90.mov"])
def test_both_decoders_agree_on_recordings(name: str) -> None:
    """The same stream, upright, the same frames and times; pixels within the rounding of colour conversion."""
    one, other = (
        read_video(VIDEOS / name, FrameSampling(num_frames=9), decoding=Decoding(backend=backend))
        for backend in ("decord", "pyav")
    )
    assert (one.backend, other.backend) == ("decord", "pyav")
    assert one.frames.shape == other.frames.shape
    assert np.abs(one.frames.astype(int) - other.frames).mean() < 2
    assert one.timestamps == pytest.approx(other.timestamps, abs=1e-4)
    assert (one.frame_indices, one.total_frames) == (other.frame_indices, other.total_frames)
    assert (one.fps, one.duration) == pytest.approx((other.fps, other.duration), abs=2e-3)
