"""The index of media: what is in it, when it counts, what is read again, and what training spares with it."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import feather

from evs_train.config import ModelSection
from evs_train.data import decode, index, lengths, rows
from evs_train.data import probe as probing
from evs_train.data.batches import TrainingStream
from evs_train.data.decoded import Decoded, Sink
from evs_train.data.decoding import Decoding
from evs_train.data.index import Entry, Fault, Kind, MediaIndex, index_file, key_of, state_of
from evs_train.data.manifest import read_rows
from evs_train.data.media_files import MediaFile
from evs_train.data.order import DrawOrder
from evs_train.data.probe import probe, probe_all, unknown
from evs_train.data.rows import RowReader
from evs_train.data.schedule import FixedBatches, Slot
from evs_train.data.sources import FrameList, Source, TarMember
from evs_train.data.video import FrameSampling, read_video
from evs_train.data_config import DataSection
from evs_train.errors import DataError, MediaError
from evs_train.models.base import Family
from evs_train.models.loading import load_family
from tests.conftest import write_noise

SAMPLING = FrameSampling(fps=4.0, min_frames=2)
TURNED = Path(__file__).resolve().parents[3] / "shared" / "videos" / "video_90.mov"


@pytest.fixture
def media(tmp_path: Path) -> list[tuple[Kind, Source]]:
    """A good video, a torn one, a good image and a bad one."""
    write_noise(tmp_path / "good.mp4", num_frames=20, width=96)
    whole = (tmp_path / "good.mp4").read_bytes()
    (tmp_path / "torn.mp4").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((48, 80, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    (tmp_path / "note.png").write_text("no image", encoding="utf-8")
    kinds: dict[str, Kind] = {"good.mp4": "video", "torn.mp4": "video", "photo.png": "image", "note.png": "image"}
    return [(kind, str(tmp_path / name)) for name, kind in kinds.items()]


def filled(media: list[tuple[Kind, Source]], num_workers: int = 0) -> MediaIndex:
    found = MediaIndex()
    assert all(error is None for _, error in probe_all(found, unknown(found, media, SAMPLING), SAMPLING, num_workers))
    return found


def test_facts_are_those_of_the_clip(media: list[tuple[Kind, Source]]) -> None:
    (_, video), (_, torn), (_, photo), (_, note) = media
    found = filled(media)
    facts = found.entries[key_of(video)].facts
    assert facts is not None
    assert (facts.width, facts.height, facts.num_frames, facts.codec, facts.rotation) == (96, 64, 20, "h264", 0)
    clip, blank = read_video(str(video), SAMPLING), facts.blank_clip(str(video), SAMPLING)
    assert blank.frames.shape == clip.frames.shape
    assert not blank.frames.any()
    assert blank.frame_indices == clip.frame_indices
    assert np.array_equal(blank.timestamps, clip.timestamps)
    assert (blank.fps, blank.total_frames, blank.duration) == (clip.fps, clip.total_frames, clip.duration)
    assert blank.path == clip.path
    picture = found.entries[key_of(photo)].facts
    assert picture is not None
    assert (picture.width, picture.height, picture.codec) == (80, 48, "png")
    for source in (torn, note):
        entry = found.find(source)
        assert entry is not None
        assert entry.facts is None
        assert entry.fault is not None
        assert str(source) in entry.fault.message


@pytest.mark.parametrize("num_workers", [0, 2])
def test_written_and_read_it_is_the_same(media: list[tuple[Kind, Source]], tmp_path: Path, num_workers: int) -> None:
    found = filled(media, num_workers)
    path = tmp_path / "new" / "media.arrow"
    found.write(path)
    found.write(path)
    assert [file.name for file in path.parent.iterdir()] == ["media.arrow"]  # and no draft
    assert MediaIndex.read(path, facts=True) == found
    for key, entry in MediaIndex.read(path).entries.items():
        assert entry == replace(found.entries[key], facts=None)


def test_only_what_changed_is_read_again(media: list[tuple[Kind, Source]]) -> None:
    found = filled(media)
    assert unknown(found, media, SAMPLING) == []
    video = str(media[0][1])
    os.utime(video, ns=(0, os.stat(video).st_mtime_ns + 1))
    assert found.find(video) is None
    assert unknown(found, media, SAMPLING) == [("video", video, True)]
    assert [source for source, _ in probe_all(found, unknown(found, media, SAMPLING), SAMPLING, 0)] == [video]
    assert unknown(found, [*media, *media], SAMPLING) == []
    other = FrameSampling(num_frames=3)
    assert unknown(found, media, other) == [("video", video, False)]  # other frames, but the file is known to be whole
    list(probe_all(found, unknown(found, media, other), other, 0))
    facts = found.entries[video].facts
    assert facts is not None
    assert len(facts.indices) == 3


def test_faults_that_may_pass_are_not_kept(tmp_path: Path, media: list[tuple[Kind, Source]]) -> None:
    gone = str(tmp_path / "gone.mp4")
    error = probe("video", gone, SAMPLING)
    assert isinstance(error, MediaError)
    found = filled(media)
    found.entries[gone] = Entry(1, 1)
    (one,) = probe_all(found, [("video", gone, True)], SAMPLING, 0)
    assert one[0] == gone
    assert isinstance(one[1], MediaError)
    assert gone not in found.entries


def test_a_timeout_is_no_verdict(media: list[tuple[Kind, Source]], monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(path: str, sampling: FrameSampling, **options: Any) -> object:
        raise MediaError(f"{path}: no frame in 60 s", reason="timeout")

    monkeypatch.setattr(probing, "read_video", slow)
    error = probe("video", media[0][1], SAMPLING)
    assert isinstance(error, MediaError)
    assert error.reason == "timeout"


def test_states_of_what_is_no_file(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"x" * 10)
    frames = FrameList(tuple(str(tmp_path / f"{number}.png") for number in range(3)), fps=2.0)
    before = state_of(frames)
    assert before is not None
    assert before[0] == 30
    folder = state_of(str(tmp_path))
    os.utime(tmp_path / "1.png", ns=(0, 2**62))
    assert state_of(frames) != before
    assert state_of(str(tmp_path)) != folder
    (tmp_path / "2.png").unlink()
    assert state_of(frames) is None
    member = TarMember(str(tmp_path / "0.png"), "a.mp4", offset=512, size=7)
    assert state_of(member) == (7, os.stat(tmp_path / "0.png").st_mtime_ns)
    keys = {
        key_of(source)
        for source in (
            frames, FrameList(frames.paths, 4.0), FrameList(frames.paths[:2], 2.0),
            member, TarMember(member.shard, "a.mp4", offset=1024, size=7),
        )
    }  # fmt: skip
    assert len(keys) == 5


def test_an_index_that_cannot_be_read(tmp_path: Path) -> None:
    assert MediaIndex.read(tmp_path / "none.arrow") == MediaIndex()
    (tmp_path / "torn.arrow").write_bytes(b"ARROW1 and no more")
    with pytest.raises(DataError, match=r"torn\.arrow: cannot be read"):
        MediaIndex.read(tmp_path / "torn.arrow")


INT64_MAX = 2**63 - 1


@pytest.mark.parametrize("facts", [False, True])
@pytest.mark.parametrize(
    ("compression", "old", "new", "reason"),
    [
        ("uncompressed", struct.pack("<4i", 0, 4, 8, 12), struct.pack("<4i", 0, 4, 8, 2**30), "out of bounds"),
        ("uncompressed", struct.pack("<4i", 0, 4, 8, 12), struct.pack("<4i", 0, 8, 4, 12), "non-monotonic"),
        ("uncompressed", b"/001", b"/0\xff1", "UTF8"),
        ("uncompressed", b"truncated", b"truncatef", "truncatef"),
        ("uncompressed", b"mtime_ns", b"mtime_xx", "mtime_ns|columns"),
        ("lz4", struct.pack("<q", 8 * 600), struct.pack("<q", 2**50), "malloc|allocat|emory"),
        ("lz4", struct.pack("<q", 8 * 600), struct.pack("<q", INT64_MAX), "."),
    ],
)
def test_one_that_is_damaged(
    tmp_path: Path, facts: bool, compression: str, old: bytes, new: bytes, reason: str
) -> None:
    """Offsets that lead out of the file would end the process, and a length may ask for more memory than there is."""
    found = MediaIndex({f"/{n:03}": Entry(600, n, fault=Fault("m", "h", "truncated")) for n in range(600)})
    found.write(tmp_path / "media.arrow")
    feather.write_feather(feather.read_table(tmp_path / "media.arrow"), tmp_path / "media.arrow", compression)
    assert MediaIndex.read(tmp_path / "media.arrow", facts=facts) == found
    whole = (tmp_path / "media.arrow").read_bytes()
    assert old in whole
    (tmp_path / "media.arrow").write_bytes(whole.replace(old, new))
    with pytest.raises(DataError, match=rf"media\.arrow: cannot be read: .*(?:{reason})"):
        MediaIndex.read(tmp_path / "media.arrow", facts=facts)


def test_lengths_that_are_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "_settings", lambda reader: {})
    file = tmp_path / "media.rows.arrow"
    index.replace_table(file, pyarrow.table({"key": ["a", "b"], "row": ["[1", None]}))
    cache = lengths.RowCache(file, cast("RowReader", None))
    assert cache.find("c") is None
    for key in ("a", "b"):
        with pytest.raises(DataError, match=r"media\.rows\.arrow: cannot be read"):
            cache.find(key)
    index.replace_table(file, pyarrow.table({"key": ["a"]}))
    with pytest.raises(DataError, match="columns"):
        lengths.RowCache(file, cast("RowReader", None))


def test_one_of_another_version_is_empty(
    media: list[tuple[Kind, Source]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(media).write(tmp_path / "media.arrow")
    monkeypatch.setattr(index, "VERSION", "0")
    assert MediaIndex.read(tmp_path / "media.arrow") == MediaIndex()


def test_it_lies_beside_the_rows_unless_named() -> None:
    assert index_file(DataSection(rows=["/data/a.json", "/b.json"])) == Path("/data/.evs_index/media.arrow")
    assert index_file(DataSection(rows="a.json", index="/tmp/i.arrow")) == Path("/tmp/i.arrow")


class TestTraining:
    """What a stream does with an index."""

    @pytest.fixture(scope="class")
    def family(self, tiny_checkpoint: Callable[[str], Path]) -> Family:
        return load_family(ModelSection(path=str(tiny_checkpoint("qwen3_vl"))), DataSection(rows="unused.json"))

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
        """Files that were decoded, and whether they were checked from end to end."""
        made: list[tuple[str, bool]] = []

        def recorded(path: str, sampling: FrameSampling, *, verify: bool = True, **options: Any) -> object:
            made.append((Path(path).name, verify))
            return read_video(path, sampling, verify=verify, **options)

        monkeypatch.setattr(rows, "read_video", recorded)
        return made

    def stream(self, folder: Path, family: Family, found: MediaIndex) -> TrainingStream:
        talk = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "That."}]
        listed = [{"id": name, "video": f"{name}.mp4", "conversations": talk} for name in ("good", "torn")]
        (folder / "rows.json").write_text(json.dumps(listed), encoding="utf-8")
        reader = RowReader(read_rows([folder / "rows.json"]), family, SAMPLING, index=found)
        return TrainingStream(reader, DrawOrder(2, seed=0), FixedBatches(6, 1, 1))

    def test_known_files_are_not_checked_again(
        self, media: list[tuple[Kind, Source]], tmp_path: Path, family: Family, calls: list[tuple[str, bool]]
    ) -> None:
        without = [self.stream(tmp_path, family, MediaIndex()).read(Slot(draw), 0) for draw in range(6)]
        assert calls.count(("torn.mp4", True)) == 3  # a new stream for each draw
        assert set(calls) == {("torn.mp4", True), ("good.mp4", True)}
        calls.clear()
        data = self.stream(tmp_path, family, filled(media))
        with_index = [data.read(Slot(draw), 0) for draw in range(6)]
        assert set(calls) == {("good.mp4", False)}
        assert [one.sample_id for one in with_index] == [one.sample_id for one in without] == ["good"] * 6
        assert [one.bad for one in with_index] == [one.bad for one in without]
        assert any(one.bad for one in with_index)

    def test_a_bad_file_is_decoded_once(
        self, media: list[tuple[Kind, Source]], tmp_path: Path, family: Family, calls: list[tuple[str, bool]]
    ) -> None:
        data = self.stream(tmp_path, family, MediaIndex())
        bad = [one for draw in range(6) for one in data.read(Slot(draw), 0).bad]
        assert len(bad) >= 3
        assert calls.count(("torn.mp4", True)) == 1

    def test_a_repaired_file_is_read(
        self, media: list[tuple[Kind, Source]], tmp_path: Path, family: Family, calls: list[tuple[str, bool]]
    ) -> None:
        found = filled(media)
        shutil.copy(tmp_path / "good.mp4", tmp_path / "torn.mp4")
        data = self.stream(tmp_path, family, found)
        assert not any(data.read(Slot(draw), 0).bad for draw in range(6))
        assert set(calls) == {("torn.mp4", True), ("good.mp4", False)}

    def test_a_fault_is_passed_on_as_it_was(
        self, tmp_path: Path, family: Family, media: list[tuple[Kind, Source]]
    ) -> None:
        found, torn = filled(media), str(tmp_path / "torn.mp4")
        entry = found.entries[torn]
        found.entries[torn] = Entry(entry.size, entry.mtime_ns, fault=Fault(f"{torn}: broken", "mend it", "truncated"))
        data = self.stream(tmp_path, family, found)
        (bad, *_) = next(one.bad for one in (data.read(Slot(draw), 0) for draw in range(6)) if one.bad)
        assert (bad.file, bad.reason, bad.message) == (torn, "truncated", f"{torn}: broken")
        assert (bad.sample_id, bad.row) == ("torn", f"{tmp_path / 'rows.json'} row 2")


class TestDecoders:
    """What decodes a file, and what the decoding child says of it."""

    @pytest.fixture
    def files(self, tmp_path: Path) -> list[tuple[Kind, Source]]:
        """A file for each decoder: H.264 as usual, B-frames in AVI, and a folder of frames."""
        write_noise(tmp_path / "usual.mp4", num_frames=20, width=96)
        write_noise(tmp_path / "b_frames.avi", num_frames=20, width=96)  # x264 makes B-frames by itself
        (tmp_path / "frames").mkdir()
        for number in range(8):
            Image.fromarray(np.full((48, 80, 3), number, np.uint8)).save(tmp_path / "frames" / f"{number}.png")
        return [("video", str(tmp_path / name)) for name in ("usual.mp4", "b_frames.avi", "frames")]

    def test_each_file_says_what_decodes_it(self, files: list[tuple[Kind, Source]], tmp_path: Path) -> None:
        found, decoding = MediaIndex(), Decoding(frames_fps=4.0)
        list(probe_all(found, unknown(found, files, SAMPLING), SAMPLING, 0, decoding))
        assert [found.entries[str(file)].backend for _, file in files] == ["decord", "pyav", "images"]
        found.write(tmp_path / "media.arrow")
        assert [entry.backend for entry in MediaIndex.read(tmp_path / "media.arrow").entries.values()] == [
            found.entries[key].backend for key in found.entries
        ]
        facts = [found.entries[str(file)].facts for _, file in files]
        assert [one and one.codec for one in facts] == ["h264", "h264", "frames"]

    def test_no_file_is_opened_in_this_process(
        self, files: list[tuple[Kind, Source]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(av, "open", None)
        for _, file in files[:2]:
            assert isinstance(probe("video", file, SAMPLING), Entry)

    @pytest.mark.skipif(not TURNED.is_file(), reason="needs the recorded clips")
    def test_rotation_is_kept_when_sampled_otherwise(self) -> None:
        found, media = MediaIndex(), [cast(tuple[Kind, Source], ("video", str(TURNED)))]
        for sampling in (SAMPLING, FrameSampling(num_frames=2)):
            list(probe_all(found, unknown(found, media, sampling), sampling, 0))
            facts = found.entries[str(TURNED)].facts
            assert facts is not None
            assert (facts.rotation, facts.codec, facts.sampling) == (-90, "h264", str(sampling))

    def test_a_known_file_is_not_looked_through(
        self, files: list[tuple[Kind, Source]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        looked: list[str] = []

        def recorded(file: MediaFile, *rest: Any) -> decode.Examined:
            looked.append(file.name)
            return examined(file, *rest)

        examined = decode._examined.__wrapped__
        monkeypatch.setattr(decode, "_examined", recorded)

        def read(file: Source, *, suits: bool, verify: bool = False, **limits: Any) -> Decoded:
            decoding = Decoding(**limits)
            return decode.read_video(file, SAMPLING, verify=verify, suits_decord=suits, decoding=decoding, sink=Sink())

        usual, b_frames = str(files[0][1]), str(files[1][1])
        known, fresh = read(usual, suits=True), read(usual, suits=False, verify=True)
        assert looked == [usual]
        assert np.array_equal(known.frames, fresh.frames)
        assert (known.frame_indices, known.timestamps, known.fps) == (fresh.frame_indices, fresh.timestamps, fresh.fps)
        with pytest.raises(MediaError, match="96 x 64 pixels are more than 6,143"):  # limits hold all the same
            read(usual, suits=True, max_pixels=96 * 64 - 1)
        assert read(usual, suits=True, backend="pyav").backend == "pyav"
        assert read(b_frames, suits=False).backend == "pyav"
        assert looked == [usual, usual, b_frames]
        read(usual, suits=True, verify=True)
        assert looked[-1] == usual

    def test_training_says_what_suits_decord(
        self, files: list[tuple[Kind, Source]], tmp_path: Path, tiny_checkpoint: Callable[[str], Path],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        asked: dict[str, tuple[bool, bool]] = {}

        def recorded(path: str, sampling: FrameSampling, *, verify: bool, suits_decord: bool, **options: Any) -> object:
            asked[Path(path).name] = (verify, suits_decord)
            return read_video(path, sampling, verify=verify, suits_decord=suits_decord, **options)

        monkeypatch.setattr(rows, "read_video", recorded)
        family = load_family(ModelSection(path=str(tiny_checkpoint("qwen3_vl"))), DataSection(rows="unused.json"))
        talk = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "That."}]
        listed = [{"id": str(file), "video": file, "conversations": talk} for _, file in files[:2]]
        (tmp_path / "rows.json").write_text(json.dumps(listed), encoding="utf-8")
        samples = read_rows([tmp_path / "rows.json"])
        found = filled(files[:2])
        plain = RowReader(samples, family, SAMPLING)
        assert sorted(plain.read(number).decoded_by for number in range(2)) == [("decord",), ("pyav",)]
        assert asked == {"usual.mp4": (True, False), "b_frames.avi": (True, False)}
        known = RowReader(samples, family, SAMPLING, index=found)
        for number in range(2):
            one, other = plain.read(number), known.read(number)
            assert torch.equal(one.media["pixel_values_videos"], other.media["pixel_values_videos"])
            assert torch.equal(one.input_ids, other.input_ids)
        assert asked == {"usual.mp4": (False, True), "b_frames.avi": (False, False)}
