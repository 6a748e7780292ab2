"""Tests of `evs_train.data.synthetic`: the files are real, the rows repeatable, and pruning has something to find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from evs_train.data import synthetic
from evs_train.data.manifest import fingerprint, read_rows
from evs_train.data.sampling import FrameSampling
from evs_train.data.synthetic import write_dataset
from evs_train.data.video import read_image, read_video, video_metadata
from evs_train.errors import DataError

EVERY_FRAME = FrameSampling(num_frames=1000)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("synthetic") / "shapes", num_clips=32, seed=3)


def test_every_clip_decodes_with_its_times(dataset: Path) -> None:
    clips = sorted((dataset.parent / "clips").iterdir())
    assert [clip.name for clip in clips] == [f"{index:06d}.mp4" for index in range(32)]
    for index, path in enumerate(clips):
        clip = read_video(path, EVERY_FRAME)
        count = 1 if index % 16 == 15 else 16
        assert clip.frames.shape == (count, 96, 96, 3)
        assert clip.fps == 8.0
        assert clip.timestamps == pytest.approx(np.arange(count) / 8, abs=1e-6)
        assert clip.duration == pytest.approx(count / 8)
        assert video_metadata(clip).frames_indices == list(range(count))


def test_rows_mix_modalities(dataset: Path) -> None:
    samples = read_rows([dataset])
    assert Counter((len(sample.videos), len(sample.images)) for sample in samples) == {(1, 0): 32, (0, 1): 5, (0, 0): 5}
    for sample in samples:
        for image in sample.images:
            assert read_image(image).size == (96, 96)
        assert sample.messages[1]["content"][0]["text"].endswith(".")


def test_captions_tell_what_is_drawn(dataset: Path) -> None:
    """Follow the mover by its colour; see whether the other colour is there at the start and at the end."""
    colors = {"red": 0, "green": 1, "blue": 2}
    checked = Counter[str]()
    for sample in read_rows([dataset]):
        words = sample.messages[1]["content"][0]["text"].replace(";", "").rstrip(".").split()
        if "moves" not in words:
            continue
        frames = read_video(sample.videos[0], EVERY_FRAME).frames.astype(int)
        first, direction, second, change, when = words[1], words[4], words[6], words[8], words[9]
        if first in colors:
            strength = 2 * frames[..., colors[first]] - frames.sum(axis=-1)
            rows, columns = zip(*[np.argwhere(s >= np.quantile(s, 0.97)).mean(axis=0) for s in strength], strict=True)
            moved = {"right": columns[-1] - columns[0], "down": rows[-1] - rows[0]}
            moved |= {"left": -moved["right"], "up": -moved["down"]}
            assert max(moved, key=lambda name: moved[name]) == direction, sample.id
            checked["mover"] += 1
        if second in colors:
            strength = 2 * frames[..., colors[second]] - frames.sum(axis=-1)
            present = [int((s > 20).sum()) > 150 for s in strength]
            turn = {"early": 4, "late": 12}[when]
            assert present == [(frame >= turn) == (change == "appears") for frame in range(16)], sample.id
            checked["other"] += 1
    assert min(checked["mover"], checked["other"]) > 5


def changed_patches(path: Path) -> float:
    """Share of 16x16 patches with a mean absolute change above 1 of 255 since the previous frame."""
    frames = read_video(path, EVERY_FRAME).frames.astype(float)
    patches = np.abs(np.diff(frames, axis=0)).reshape(-1, 6, 16, 6, 16, 3).mean(axis=(2, 4, 5))  # (F-1, 6, 6)
    return float((patches > 1).mean())


def test_still_clips_change_in_few_places_and_noisy_ones_everywhere(dataset: Path) -> None:
    shares = [changed_patches(dataset.parent / "clips" / f"{index:06d}.mp4") for index in range(14)]
    still, noisy = shares[::2], shares[1::2]
    assert min(still) > 0.02
    assert max(still) < 0.3
    assert min(noisy) > 0.7


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_are_repeatable_and_depend_on_the_seed(dataset: Path, tmp_path: Path) -> None:
    again = write_dataset(tmp_path / "again", num_clips=32, seed=3)
    assert contents(again.parent) == contents(dataset.parent)
    assert fingerprint(read_rows([again])) == fingerprint(read_rows([dataset]))
    assert write_dataset(tmp_path / "other", num_clips=32, seed=4).read_bytes() != dataset.read_bytes()


def test_a_written_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write_dataset(tmp_path / "shapes", num_clips=2)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "shapes").rglob("*")}
    with pytest.raises(DataError, match="holds something else"):
        write_dataset(tmp_path / "shapes", num_clips=3)
    monkeypatch.delattr("evs_train.data.synthetic._write_world")  # not even to be drawn again
    assert write_dataset(tmp_path / "shapes", num_clips=2) == rows
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "shapes").rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]  # no staging folder stays behind


def test_files_of_another_renderer_are_replaced_and_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shapes"
    write_dataset(folder, num_clips=2)
    rendered = contents(folder)
    monkeypatch.setattr("evs_train.data.synthetic._encode", lambda path, *_: path.write_bytes(b"of an older version"))
    monkeypatch.setattr("evs_train.data.synthetic._renderer", lambda: "another")
    (folder / "notes.txt").write_text("mine")
    write_dataset(folder, num_clips=2)
    assert (folder / "clips" / "000001.mp4").read_bytes() == b"of an older version"
    monkeypatch.undo()
    write_dataset(folder, num_clips=2)
    assert contents(folder) == {**rendered, "notes.txt": b"mine"}
    with pytest.raises(DataError, match="holds something else"):
        write_dataset(folder, num_clips=3)


def test_the_renderer_is_this_code_and_its_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    before = synthetic._renderer()
    assert before == synthetic._renderer()
    monkeypatch.setattr("av.__version__", "0")
    assert synthetic._renderer() != before


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("evs_train.data.synthetic._encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "shapes", num_clips=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [{"num_clips": 0}, {"size": 97}, {"num_frames": 1}, {"fps": 0.0}])
def test_impossible_worlds_are_refused(tmp_path: Path, arguments: dict[str, int]) -> None:
    with pytest.raises(DataError, match="no such world"):
        write_dataset(tmp_path / "shapes", **arguments)


def test_command_line(tmp_path: Path) -> None:
    """Another process, with as many threads as it likes, writes the same files."""
    command = [sys.executable, "-m", "evs_train.data.synthetic", "--out", str(tmp_path / "shapes"), "--clips", "2"]
    threads = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, env=threads, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == tmp_path / "shapes" / "train.jsonl"
    world = json.loads((tmp_path / "shapes" / "world.json").read_text())
    arguments = {"fps": 8.0, "num_clips": 2, "num_frames": 16, "seed": 0, "size": 96}
    assert world == {**arguments, "renderer": synthetic._renderer()}
    assert contents(tmp_path / "shapes") == contents(write_dataset(tmp_path / "here", num_clips=2).parent)
    failed = subprocess.run([*command[:-1], "0"], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: no such world")
