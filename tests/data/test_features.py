"""Entries of what a tower said: whole or not there, within the bound, and never those of another medium or setting."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from evs_train.data.features import FeatureStore, Stored
from evs_train.data.index import Facts
from evs_train.data.manifest import Sample
from evs_train.data.sampling import FrameSampling
from evs_train.data.sources import FrameList

FACTS = Facts("video", 64, 48, "h264", 12, 8.0, 1.5, indices=(0, 3, 7), timestamps=(0.0, 0.375, 0.1 + 0.2))
SAMPLING = FrameSampling(num_frames=4)


def store(path: Path, max_bytes: int = 1 << 20, **settings: str) -> FeatureStore:
    return FeatureStore.of(path, max_bytes, settings)


def stored(seed: int = 0, size: int = 8) -> Stored:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(size, 3, 5, generator=generator)
    return Stored([wide.bfloat16(), wide.transpose(1, 2)], FACTS)


def files(path: Path) -> list[Path]:
    return sorted(file for file in path.glob("*/*/*") if file.is_file())


def test_an_entry_comes_back_to_the_bit_and_in_its_layout(tmp_path: Path) -> None:
    cache, given = store(tmp_path), stored()
    assert cache.read("ab1") is None
    size = cache.write("ab1", given)
    assert size == sum(file.stat().st_size for file in files(tmp_path)) > 0
    found = cache.read("ab1")
    assert found is not None
    for one, other in zip(given.outputs, found.outputs, strict=True):
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())
        assert torch.equal(one, other)
    assert repr(found.facts.timestamps[2]) == repr(FACTS.timestamps[2])
    assert (found.facts.width, found.facts.fps, list(found.facts.indices)) == (64, 8.0, [0, 3, 7])
    assert cache.write("ab1", stored(1)) == 0
    assert torch.equal(cache.read("ab1").outputs[0], given.outputs[0])  # type: ignore[union-attr]


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:100],
        lambda content: content[:-1],
        lambda content: flip(content, len(content) - 3),  # of a tensor
        lambda content: content.replace(b"12, 8.0", b"12, 9.0").replace(b'"fps\\": 8.0', b'"fps\\": 9.0'),
        lambda content: b"x" * len(content),
    ],
    ids=["empty", "torn header", "torn tensor", "flipped bit", "other facts", "noise"],
)
def test_a_damaged_entry_is_no_entry_and_is_written_anew(
    tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    cache = store(tmp_path)
    size = cache.write("ab1", stored())
    (file,) = files(tmp_path)
    content = file.read_bytes()
    damaged = damage(content)  # type: ignore[operator]
    assert damaged != content
    file.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        assert cache.read("ab1") is None
    assert str(file) in caplog.text
    assert files(tmp_path) == []
    assert cache.write("ab1", stored()) == size
    assert cache.read("ab1") is not None


def test_a_row_is_found_only_if_all_of_its_media_are(tmp_path: Path) -> None:
    cache = store(tmp_path)
    cache.write("a1", stored(1))
    cache.write("b2", stored(2))
    assert cache.find({"video": ["a1", "c3"], "image": ["b2"]}) is None
    found = cache.find({"video": ["a1"], "image": ["b2"]})
    assert found is not None
    assert torch.equal(found["image"][0].outputs[0], stored(2).outputs[0])
    assert cache.find({"video": [], "image": []}) == {"video": [], "image": []}
    next(file for file in files(tmp_path) if file.name.startswith("a1")).write_bytes(b"torn")
    assert cache.find({"video": ["a1"], "image": ["b2"]}) is None


def test_the_bound_holds_for_all_settings_together(tmp_path: Path) -> None:
    one = store(tmp_path, tower="one")
    size = one.write("a1", stored())
    assert size
    bound = int(2.5 * size)
    one, other = store(tmp_path, bound, tower="one"), store(tmp_path, bound, tower="other")
    assert one.settings != other.settings
    assert other.read("a1") is None
    assert other.write("a1", stored()) == size
    assert one.write("b2", stored()) is None
    assert other.write("b2", stored()) is None
    assert one.write("a1", stored()) == 0
    assert sum(file.stat().st_size for file in files(tmp_path)) == 2 * size
    assert one.read("a1") is not None  # what was there first stays
    files(tmp_path)[0].unlink()  # by hand; the next run counts again
    assert store(tmp_path, bound, tower="one").write("b2", stored()) == size


def test_a_damaged_entry_gives_back_its_room(tmp_path: Path) -> None:
    size = store(tmp_path).write("a1", stored())
    assert size
    cache = store(tmp_path, size)
    files(tmp_path)[0].write_bytes(b"x" * size)
    assert cache.read("a1") is None
    assert cache.write("b2", stored()) == size


def test_old_drafts_of_killed_processes_go(tmp_path: Path) -> None:
    cache = store(tmp_path)
    folder = cache.folder / "ab"
    folder.mkdir()
    old, young = folder / "ab1.draft17", folder / "ab2.draft18"
    for draft in (old, young):
        draft.write_bytes(b"torn")
    os.utime(old, (0, 0))
    store(tmp_path)
    assert files(tmp_path) == [young]


def write_all(path: Path, bound: int, seed: int) -> None:
    cache = FeatureStore(path, FeatureStore.of(path, bound, {}).settings, bound)
    for number in range(40):
        own = (number + 7 * seed) % 20
        cache.write(f"{own:02d}", stored(own, size=200))
        cache.read(f"{(own + 3) % 20:02d}")


def test_processes_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They write the same entries at the same time, and together no more than the bound."""
    size_of = FeatureStore._size

    def slowly(cache: FeatureStore) -> int:
        found = size_of(cache)
        time.sleep(0.01)  # so that another process would come in between
        return found

    monkeypatch.setattr(FeatureStore, "_size", slowly)
    size = store(tmp_path / "one").write("00", stored(0, size=200))
    assert size
    bound = 12 * size + size // 2
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_all, args=(tmp_path / "all", bound, seed)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    written = files(tmp_path / "all")
    assert len(written) == 12
    cache = store(tmp_path / "all", bound)
    for file in written:
        found = cache.read(file.stem)
        assert found is not None
        assert torch.equal(found.outputs[0], stored(int(file.stem), size=200).outputs[0])


def sample(*videos: str | FrameList, images: tuple[str, ...] = ()) -> Sample:
    return Sample("row", "rows.json row 1", (), videos, images)


def only(keys: dict[str, list[str]] | None, kind: str = "video") -> str:
    assert keys is not None
    (key,) = keys[kind]
    return key


def test_a_key_changes_with_whatever_changes_what_the_tower_sees(tmp_path: Path) -> None:
    cache, file, other = store(tmp_path / "cache"), tmp_path / "a.mp4", tmp_path / "b.mp4"
    for path in (file, other):
        path.write_bytes(b"clip")
        os.utime(path, (1, 1))
    key = only(cache.keys(sample(str(file)), SAMPLING))
    assert key == only(cache.keys(sample(str(file)), FrameSampling(num_frames=4)))
    different = {
        "other file": cache.keys(sample(str(other)), SAMPLING),
        "more frames": cache.keys(sample(str(file)), FrameSampling(num_frames=5)),
        "by time": cache.keys(sample(str(file)), FrameSampling(fps=4.0)),
        "fewer of them": cache.keys(sample(str(file)), replace(SAMPLING, share=0.75)),
        "a part": cache.keys(sample(str(file)), replace(SAMPLING, segment=(0.0, 1.0))),
    }
    os.utime(file, (2, 2))
    different["later"] = cache.keys(sample(str(file)), SAMPLING)
    file.write_bytes(b"longer clip")
    os.utime(file, (1, 1))
    different["longer"] = cache.keys(sample(str(file)), SAMPLING)
    found = {name: only(keys) for name, keys in different.items()}
    assert len({key, *found.values()}) == 1 + len(found), found
    file.unlink()
    assert cache.keys(sample(str(file)), SAMPLING) is None


def test_media_that_stand_together_have_keys_of_their_own(tmp_path: Path) -> None:
    """LLaVA-OneVision cuts an image into tiles only if it stands alone in its row."""
    cache = store(tmp_path / "cache")
    for name in ("a.png", "b.png", "a.mp4"):
        (tmp_path / name).write_bytes(b"content")
    a, b, video = (str(tmp_path / name) for name in ("a.png", "b.png", "a.mp4"))
    alone = only(cache.keys(sample(images=(a,)), SAMPLING), "image")
    both = cache.keys(sample(images=(a, b)), SAMPLING)
    twice = cache.keys(sample(images=(a, a)), SAMPLING)
    assert both is not None
    assert twice is not None
    assert len({alone, *both["image"], *twice["image"]}) == 5
    beside_video = cache.keys(sample(video, images=(a,)), SAMPLING)
    assert only(beside_video, "image") == alone


def test_a_relative_path_is_that_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, found = store(tmp_path / "cache"), set()
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        (folder / "a.mp4").write_bytes(b"clip")
        os.utime(folder / "a.mp4", (1, 1))
        monkeypatch.chdir(folder)
        found.add(only(cache.keys(sample("a.mp4"), SAMPLING)))
        found.add(only(cache.keys(sample(FrameList(("a.mp4",), 2.0)), SAMPLING)))
    assert len(found) == 4


def test_tensors_of_one_number_and_none(tmp_path: Path) -> None:
    given: list[Tensor] = [torch.ones(1, 1), torch.ones(0, 3)]
    cache = store(tmp_path)
    cache.write("a1", Stored(given, FACTS))
    found = cache.read("a1")
    assert found is not None
    assert [one.shape for one in found.outputs] == [(1, 1), (0, 3)]
