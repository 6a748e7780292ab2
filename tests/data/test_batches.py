"""The order of draws, and a stream that hands out errors instead of raising them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evs_train.config import ModelSection
from evs_train.data.batches import TrainingStream
from evs_train.data.chat import Example
from evs_train.data.manifest import read_data
from evs_train.data.order import DrawOrder, epoch_order
from evs_train.data.quarantine import NoneLeftError
from evs_train.data.rows import RowReader
from evs_train.data.sampling import FrameSampling
from evs_train.data.schedule import FixedBatches, Slot
from evs_train.data_config import DataSection
from evs_train.errors import DataError, MediaError
from evs_train.models.base import Family
from evs_train.models.loading import load_family


@pytest.fixture(scope="module")
def family(tiny_checkpoint: Callable[[str], Path]) -> Family:
    return load_family(ModelSection(path=str(tiny_checkpoint("qwen3_vl"))), DataSection(rows="unused.json"))


def stream(rows: Path, family: Family, max_length: int | None = None, **options: Any) -> TrainingStream:
    """Two epochs in micro-batches of one row."""
    samples = read_data(DataSection(rows=[str(rows)], allow_outside=True)).samples
    reader = RowReader(samples, family, FrameSampling(fps=8.0), max_length=max_length)
    order = DrawOrder(len(samples), seed=0)
    return TrainingStream(reader, order, FixedBatches(2 * len(samples), 1, 1), **options)


def sample_of_draw(draw: int, num_rows: int, seed: int) -> int:
    return DrawOrder(num_rows, seed).row(draw)


@pytest.mark.parametrize("size", [1, 2, 57])
def test_an_epoch_is_a_permutation(size: int) -> None:
    assert sorted(epoch_order(size, seed=3, epoch=1).tolist()) == list(range(size))


def test_the_order_depends_on_seed_and_epoch_and_nothing_else() -> None:
    orders = {(s, e): tuple(epoch_order(57, seed=s, epoch=e).tolist()) for s in (0, 1) for e in (0, 1, 2)}
    assert len(set(orders.values())) == 6
    np.random.default_rng(0).random(10)
    np.random.random(3)
    epoch_order.cache_clear()
    assert {key: tuple(epoch_order(57, *key).tolist()) for key in reversed(orders)} == orders


def test_the_order_is_pinned() -> None:
    """A change here would silently give resumed runs another order."""
    assert epoch_order(8, seed=0, epoch=0).tolist() == [0, 5, 4, 6, 1, 2, 7, 3]


def test_every_epoch_shows_each_row_once() -> None:
    shown = [sample_of_draw(draw, 10, seed=4) for draw in range(30)]
    epochs = [shown[0:10], shown[10:20], shown[20:30]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_draws_show_the_rows_of_the_order(mixed_rows: Path, family: Family) -> None:
    data = stream(mixed_rows, family)
    assert len(data) == 10
    for draw in range(len(data)):
        (example,) = data[draw].rows
        assert isinstance(example, Example)
        assert data[draw].step == draw
        assert example.draw == draw
        assert example.sample_id == data.reader.samples[sample_of_draw(draw, 5, seed=0)].id


def test_reading_twice_gives_the_same(mixed_rows: Path, family: Family) -> None:
    draw = next(d for d in range(5) if stream(mixed_rows, family).read(Slot(d), 0).items)
    first, second = (stream(mixed_rows, family).read(Slot(draw), 0) for _ in range(2))
    assert torch.equal(first.input_ids, second.input_ids)
    assert all(torch.equal(first.media[name], second.media[name]) for name in first.media)


def test_frames_are_kept_for_picture_draws_only(mixed_rows: Path, family: Family) -> None:
    plain = stream(mixed_rows, family)
    with_video = [d for d in range(5) if any(item.kind == "video" for item in plain.read(Slot(d), 0).items)]
    assert len(with_video) == 3
    data = stream(mixed_rows, family, picture_draws=frozenset(with_video[:1]))
    assert [bool(data.read(Slot(draw), 0).frames) for draw in with_video] == [True, False, False]
    assert plain.read(Slot(with_video[0]), 0).frames == ()


def test_errors_are_values(tmp_path: Path, world: Path, family: Family) -> None:
    (tmp_path / "torn.mp4").write_bytes((world.parent / "clips" / "000000.mp4").read_bytes()[:1500])
    talk = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "That."}]
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"video": "torn.mp4", "conversations": talk}]), encoding="utf-8")
    data = stream(rows, family, quarantine=False)
    (error,) = data[0].rows
    assert isinstance(error, MediaError)
    assert "torn.mp4" in error.message
    with pytest.raises(MediaError):
        data.read(Slot(0), 0)


def test_a_bad_sample_shifts_no_other_draw(mixed_rows: Path, tmp_path: Path, family: Family) -> None:
    rows = json.loads(mixed_rows.read_text(encoding="utf-8"))
    clip = (mixed_rows.parent / "still.mp4").read_bytes()
    for number in (1, 3):
        (tmp_path / f"torn{number}.mp4").write_bytes(clip[:500])
        rows[number] |= {"video": str(tmp_path / f"torn{number}.mp4"), "image": []}
        rows[number]["conversations"][0]["value"] = "<video>\nWhat?"
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    section = DataSection(rows=[str(file)], media_root=str(mixed_rows.parent), allow_outside=True)
    samples = read_data(section).samples
    readers = [RowReader(samples, family, FrameSampling(fps=8.0)) for _ in range(2)]
    data, alone = (TrainingStream(reader, DrawOrder(5, seed=0), FixedBatches(20, 1, 1)) for reader in readers)
    shown = {draw: data.read(Slot(draw), draw) for draw in range(20)}
    assert {draw: alone.read(Slot(draw), draw).sample_id for draw in reversed(range(20))} == {
        draw: example.sample_id for draw, example in shown.items()
    }
    lengths = set()
    for draw, example in shown.items():
        number = sample_of_draw(draw, 5, seed=0)
        tried = [number]
        while tried[-1] in (1, 3):
            tried.append(DrawOrder(5, seed=0).row(draw, len(tried)))
        assert example.draw == draw
        assert example.sample_id == samples[tried[-1]].id
        assert [bad.sample_id for bad in example.bad] == [samples[n].id for n in dict.fromkeys(tried[:-1])]
        assert [bad.attempt for bad in example.bad] == sorted({tried.index(n) for n in tried[:-1]})
        assert {bad.step for bad in example.bad} <= {draw}
        assert all(bad.file == samples[tried[bad.attempt]].videos[0] for bad in example.bad)
        lengths.add(len(tried))
    assert max(lengths) > 2  # a stand-in was bad, too


def test_a_stand_in_is_pinned() -> None:
    """A change here would silently give resumed runs other rows."""
    assert [DrawOrder(100, seed=1).row(7, attempt) for attempt in (1, 2, 3)] == [28, 17, 44]


def test_a_draw_gives_up(mixed_rows: Path, family: Family) -> None:
    data = stream(mixed_rows, family, max_length=5, max_bad_in_a_row=50)
    (error,) = data[0].rows
    assert isinstance(error, NoneLeftError)
    assert {bad.sample_id for bad in error.bad} == {"two", "image", "text", "still", "both"}  # each once
    assert {bad.reason for bad in error.bad} == {"too long"}
    assert {bad.file for bad in error.bad} == {None}
    assert "evs-train check finds all of them" in error.hint


def test_a_row_longer_than_max_length_is_a_value_too(mixed_rows: Path, family: Family) -> None:
    data = stream(mixed_rows, family, max_length=5, quarantine=False)
    (error,) = data[0].rows
    assert isinstance(error, DataError)
    assert str(mixed_rows) in error.message
    assert "row " in error.message
    assert "data.max_length = 5" in error.message
