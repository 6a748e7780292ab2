"""Listings, subsets and weights: exact shares, the same in every run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evs_train.data.manifest import TrainingData, fingerprint, read_data
from evs_train.data.mixture import rows_per_epoch, subset_of
from evs_train.data.order import DrawOrder, epoch_order
from evs_train.data.schedule import Slot
from evs_train.data_config import DataSection
from evs_train.errors import DataError, EvsTrainError
from evs_train.uptrain import Run
from tests.runs import arguments, recipe_of

TALK = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]


def write(folder: Path, **sizes: int) -> None:
    for name, size in sizes.items():
        rows = [{"id": f"{name}{number}", "conversations": TALK} for number in range(size)]
        (folder / f"{name}.json").write_text(json.dumps(rows))


def listing(folder: Path, *entries: dict[str, Any], **options: Any) -> TrainingData:
    (folder / "mix.yaml").write_text(json.dumps({"datasets": list(entries)}))
    return read_data(DataSection(rows=[str(folder / "mix.yaml")], **options))


def ids(data: TrainingData) -> list[str]:
    return [sample.id for sample in data.samples]


def test_a_listing_of_llava_next(tmp_path: Path) -> None:
    """As scripts/train/onevision.yaml is written, comments and quotes included."""
    write(tmp_path, a=25, b=3, c=7)
    (tmp_path / "exp.yaml").write_text(
        "datasets:\n"
        f"  - json_path: {tmp_path}/a.json\n"
        '    sampling_strategy: "first:10%"\n'
        "  # - json_path: /gone/x.json\n"
        '  #   sampling_strategy: "first:10%"\n'
        f"  - json_path: {tmp_path}/b.json # not released\n"
        "    sampling_strategy: all\n"
        f"  - json_path: {tmp_path}/c.json\n"
        '    sampling_strategy: "end:20%"\n'
    )
    data = read_data(DataSection(rows=[str(tmp_path / "exp.yaml")]))
    assert ids(data) == ["a0", "a1", "a2", "b0", "b1", "b2", "c5", "c6"]
    assert data.shares == ()


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("all", list(range(10))),
        ("first:3", [0, 1, 2]),
        ("first:30%", [0, 1, 2]),
        ("first:0.1%", [0]),
        ("first:99", list(range(10))),
        ("end:2", [8, 9]),
        ("end:11%", [8, 9]),
        ("end:99", list(range(10))),
        ("random:100%", list(range(10))),
    ],
)
def test_subsets(tmp_path: Path, strategy: str, expected: list[int]) -> None:
    write(tmp_path, a=10)
    data = listing(tmp_path, {"json_path": "a.json", "sampling_strategy": strategy})
    assert ids(data) == [f"a{number}" for number in expected]


def test_random_subsets_are_the_same_in_every_run(tmp_path: Path) -> None:
    write(tmp_path, a=1000)
    data = listing(tmp_path, {"json_path": "a.json", "sampling_strategy": "random:5%"})
    numbers = [int(name.removeprefix("a")) for name in ids(data)]
    assert numbers == sorted(set(numbers)) == list(subset_of("random", 50, 1000))
    assert numbers[:5] == [16, 43, 70, 91, 111]


def test_rows_outside_a_subset_are_not_judged(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"id": "good", "conversations": TALK}, {"bad": 1}]))
    assert ids(listing(tmp_path, {"json_path": "a.json", "sampling_strategy": "first:1"})) == ["good"]
    with pytest.raises(DataError, match="row 2"):
        listing(tmp_path, {"json_path": "a.json", "sampling_strategy": "end:1"})


def test_each_source_has_its_own_format_and_root(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "v.mp4").write_bytes(b"x")
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    (tmp_path / "v.jsonl").write_text(json.dumps({"video": "v.mp4", "conversations": talk}))
    write(tmp_path, a=1)
    plain = {"json_path": "a.json"}
    data = listing(
        tmp_path, {"json_path": "v.jsonl", "format": "llava_video", "media_root": "media"}, plain, format="qwen"
    )
    assert data.samples[0].videos == (str(tmp_path / "media" / "v.mp4"),)
    assert [part.formats for part in data.parts] == [{"llava_video": 1}, {"qwen": 1}]
    with pytest.raises(DataError, match=r"a\.json row 1: .*format swift expects"):
        listing(tmp_path, {**plain, "format": "swift"})


def test_patterns_are_one_source(tmp_path: Path) -> None:
    write(tmp_path, s1=2, s0=2)
    data = listing(tmp_path, {"json_path": "s*.json", "sampling_strategy": "first:3"})
    assert ids(data) == ["s00", "s01", "s10"]
    assert len(data.parts) == 1
    assert len(read_data(DataSection(rows=[str(tmp_path / "s[01].json")])).samples) == 4
    with pytest.raises(DataError, match=r"t\*\.json: no file matches"):
        listing(tmp_path, {"json_path": "t*.json"})


@pytest.mark.parametrize(("name", "fault"), [("*.json", "no file matches"), (".json", "File name too long")])
def test_a_name_that_no_file_system_takes(name: str, fault: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=fault):
        listing(tmp_path, {"json_path": 300 * "a" + name})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: [{json_path: a.json, wieght: 2}]", r"datasets\.0\.wieght: unknown key; did you mean weight"),
        ("datasets: [{sampling_strategy: all}]", r"datasets\.0\.json_path: Field required"),
        ("datasets: [{json_path: a.json, weight: 0}]", r"datasets\.0\.weight: .*greater than 0"),
        ("datasets: [{json_path: a.json, format: qwen2}]", r"datasets\.0\.format: .*'qwen'"),
        ("datasets: []", "datasets: List should have at least 1"),
        ("[1]", "Input should be a valid dictionary"),
        ("datasets: [", "not valid YAML"),
        (
            "datasets: [{json_path: a.json, sampling_strategy: 'last:10%'}]",
            "entry 1: unknown sampling_strategy 'last:10%'",
        ),
        ("datasets: [{json_path: a.json, sampling_strategy: 'first:1.5'}]", "unknown sampling_strategy"),
        ("datasets: [{json_path: a.json, sampling_strategy: 'first:0%'}]", r"a\.json: first:0% takes no row"),
        ("datasets: [{json_path: a.json, weight: 2}, {json_path: a.json}]", r"a\.json has no weight, but others have"),
        (
            "datasets: [{json_path: a.json, weight: 1}, {json_path: a.json, weight: 100}]",
            "less than one row in an epoch of 4",
        ),
    ],
)
def test_bad_listings_are_refused(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, a=2)
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(EvsTrainError, match=message):
        read_data(DataSection(rows=[str(tmp_path / "mix.yaml")]))


def test_a_listing_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="listing cannot be read"):
        read_data(DataSection(rows=[str(tmp_path / "mix.yml")]))


def test_weights_are_shares_of_an_epoch() -> None:
    assert rows_per_epoch([10, 10], [1, 3]) == [5, 15]
    assert rows_per_epoch([1, 1, 1], [1, 1, 1]) == [1, 1, 1]
    assert rows_per_epoch([5, 5], [1, 2]) == [3, 7]
    assert rows_per_epoch([4, 3], [1, 1]) == [4, 3]
    assert rows_per_epoch([1000, 10, 7], [0.1, 0.2, 0.7]) == [102, 203, 712]
    assert sum(rows_per_epoch([10**9 + 7, 3], [0.1, 1e-6])) == 10**9 + 10


def test_every_epoch_has_the_shares_and_passes_are_whole(tmp_path: Path) -> None:
    write(tmp_path, few=20, many=180)
    entries = ({"json_path": "few.json", "weight": 3}, {"json_path": "many.json", "weight": 1})
    data = listing(tmp_path, *entries)
    assert data.shares == ((20, 150), (180, 50))
    assert data.describe()[0] == f"{'few.json'}: 20 rows (20 qwen), 150 an epoch by weight 3"
    shown = [[int(row) for row in epoch_order(200, 7, epoch, data.shares)] for epoch in range(18)]
    for epoch in shown:
        assert len(epoch) == 200
        assert sum(row < 20 for row in epoch) == 150  # the weight, exactly
        assert all(7 <= count <= 8 or row >= 20 for row, count in Counter(epoch).items())
    # 18 epochs of 50 are 5 whole passes over the 180: each row as often as any other.
    assert set(Counter(row for epoch in shown for row in epoch if row >= 20).values()) == {5}
    assert shown[0] != shown[1]


def test_a_mixture_is_a_pure_function_of_seed_and_epoch() -> None:
    shares = ((5, 12), (15, 8))
    orders = {
        (seed, epoch): tuple(epoch_order(20, seed, epoch, shares).tolist()) for seed in (0, 1) for epoch in (0, 1, 2)
    }
    assert len(set(orders.values())) == 6
    epoch_order.cache_clear()
    assert {key: tuple(epoch_order(20, *key, shares).tolist()) for key in reversed(orders)} == orders
    assert [DrawOrder(20, 1, shares).row(20 + place) for place in range(20)] == list(orders[1, 1])
    assert orders[0, 0] == (0, 0, 1, 9, 3, 13, 1, 4, 8, 12, 11, 4, 2, 19, 2, 15, 3, 0, 7, 2)


def test_a_run_draws_by_the_weights_and_records_them(
    tmp_path: Path, world: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    rows = [json.loads(line) for line in world.read_text().splitlines()]
    for name, chosen in (
        ("clips", [row for row in rows if "video" in row]),
        ("rest", [r for r in rows if "video" not in r]),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(chosen))
    entries = [{"json_path": f"{name}.json", "weight": weight} for name, weight in (("clips", 1), ("rest", 9))]
    (tmp_path / "mix.yaml").write_text(json.dumps({"datasets": entries}))
    words = arguments(
        tiny_checkpoint("qwen3_vl"), tmp_path / "mix.yaml", tmp_path / "run", data__media_root=str(world.parent)
    )
    run = Run(recipe_of(words))
    shown = [run.samples[run.order.row(d)] for d in range(len(rows))]
    assert sum(bool(sample.videos) for sample in shown) == round(len(rows) / 10)
    assert [run.stream.read(Slot(draw), 0).sample_id for draw in range(3)] == [sample.id for sample in shown[:3]]
    record = run._record()
    assert record["data_sources"] == run.data.describe()
    assert record["data_fingerprint"] == fingerprint(run.samples, run.data.shares) != fingerprint(run.samples)


def test_without_weights_the_order_is_that_of_one_file(tmp_path: Path) -> None:
    write(tmp_path, a=5, b=3)
    data = listing(tmp_path, {"json_path": "a.json"}, {"json_path": "b.json"})
    assert data.shares == ()
    assert epoch_order(8, 0, 0, data.shares).tolist() == [0, 5, 4, 6, 1, 2, 7, 3]
