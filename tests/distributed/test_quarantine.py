"""A bad row in training: the same rows, curve and record for any number of processes and workers; one common end."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evs_train.data.manifest import Samples, read_data
from evs_train.data.order import DrawOrder
from evs_train.data_config import DataSection
from evs_train.errors import BudgetError
from evs_train.uptrain import Run
from launch import uptrain
from tests.runs import arguments, metrics, recipe_of, torchrun

STEPS = 6
BATCH = 4
SAME = ("loss", "evs/rate", "evs/video_tokens_before", "evs/video_tokens_after", "evs/supervised_tokens")


def samples_of(rows: Path, world: Path) -> Samples:
    """The rows, with paths that start at the world's folder, and others that lie elsewhere."""
    return read_data(DataSection(rows=[str(rows)], media_root=str(world.parent), allow_outside=True)).samples


def rows_with(folder: Path, world: Path, bad: int) -> Path:
    """The first 12 rows of the world, of which the first `bad` rows with a video have a torn one."""
    clip = (world.parent / "clips" / "000000.mp4").read_bytes()
    rows = [json.loads(line) for line in world.read_text(encoding="utf-8").splitlines()][:12]
    for number, row in enumerate([row for row in rows if "video" in row][:bad]):
        (folder / f"torn{number}.mp4").write_bytes(clip[:1500])
        row["video"] = str(folder / f"torn{number}.mp4")
        row["id"] = f"bad{number}"
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def words_of(checkpoint: Path, rows: Path, output: Path, **options: Any) -> list[str]:
    settings: dict[str, Any] = {
        "train__steps": STEPS,
        "train__batch_size": BATCH,
        "evs__rate": {"kind": "uniform", "min": 0.2, "max": 0.8},
        **options,
    }
    return arguments(checkpoint, rows, output, **settings)


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("qwen3_vl")


def record(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_bad_row_leaves_the_same_curve_whoever_reads_it(checkpoint: Path, world: Path, tmp_path: Path) -> None:
    rows = rows_with(tmp_path, world, bad=2)
    options = {"data__media_root": world.parent, "data__allow_outside": True}
    for workers in (0, 2):
        output = tmp_path / f"workers{workers}"
        Run(recipe_of(words_of(checkpoint, rows, output, data__num_workers=workers, **options))).train()
    words = words_of(checkpoint, rows, tmp_path / "two", train__batch_size=BATCH // 2, data__num_workers=1, **options)
    done = torchrun(words, 2)
    assert done.returncode == 0, done.stderr[-4000:]
    expected, expected_record = metrics(tmp_path / "workers0"), record(tmp_path / "workers0")
    assert expected_record == record(tmp_path / "workers2") == record(tmp_path / "two")
    workers2, two = metrics(tmp_path / "workers2"), metrics(tmp_path / "two")
    assert [line["loss"] for line in workers2] == [line["loss"] for line in expected]
    for one, other in zip(expected, two, strict=True):
        assert {name: other[name] for name in SAME} == pytest.approx({name: one[name] for name in SAME}, rel=1e-5)
        counts = {name: value for name, value in one.items() if name.startswith("data/")}
        assert counts == {name: value for name, value in other.items() if name.startswith("data/")}
    samples = samples_of(rows, world)
    bad = {number for number, sample in enumerate(samples) if sample.id.startswith("bad")}
    drawn = [DrawOrder(len(samples), 0).row(draw) for draw in range(STEPS * BATCH)]
    replaced = [draw for draw, number in enumerate(drawn) if number in bad]
    assert len(replaced) == 4  # two rows in two epochs
    assert sorted({line["draw"] for line in expected_record}) == replaced
    for line in expected_record:
        number = DrawOrder(len(samples), 0).row(line["draw"], line["attempt"])
        assert line["sample"] == samples[number].id
        assert line["row"] == samples[number].source
        assert line["file"] == samples[number].videos[0]
        assert line["step"] == line["draw"] // BATCH
        assert not line["shown"].startswith("bad")
    assert expected[-1]["data/quarantined"] == len(expected_record)
    assert expected[-1]["data/quarantined"] == sum(v for k, v in expected[-1].items() if "quarantined/" in k)


def test_a_resumed_run_records_each_draw_once(checkpoint: Path, world: Path, tmp_path: Path) -> None:
    rows = rows_with(tmp_path, world, bad=2)
    options = {"data__media_root": world.parent, "data__allow_outside": True, "train__save_every": 2}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for output in (whole, resumed):
        Run(recipe_of(words_of(checkpoint, rows, output, **options))).train()
    assert any(line["step"] >= 2 for line in record(whole))
    assert any(line["step"] < 2 for line in record(whole))
    for folder in (resumed / "checkpoint-4", resumed / "checkpoint-6", resumed / "final"):
        shutil.rmtree(folder)
    shutil.copytree(whole / "checkpoint-4", resumed / "checkpoint-4")
    Run(recipe_of(words_of(checkpoint, rows, resumed, train__resume=True, **options))).train()
    assert record(resumed) == record(whole)
    names = [name for name in metrics(whole)[-1] if name.startswith("data/")]
    assert [metrics(resumed)[-1][name] for name in names] == [metrics(whole)[-1][name] for name in names]


def test_a_bad_share_ends_the_run_with_3(
    checkpoint: Path, world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = rows_with(tmp_path, world, bad=1)
    options = {
        "data__media_root": world.parent,
        "data__allow_outside": True,
        "train__batch_size": 52,
        "train__steps": 3,
        "evs__rate": 0.5,
    }
    assert uptrain.main(words_of(checkpoint, rows, tmp_path / "run", **options)) == 3
    error = capfd.readouterr().err
    error = error[error.index("error: ") :]
    found = re.match(r"error: too many bad samples: (\d+) of 104 draws \((.*?)\) met bad samples; by reason: ", error)
    assert found, error
    assert 8 <= int(found[1]) <= 10  # the row stands in each epoch of 12
    assert str(tmp_path / "run" / "quarantine.jsonl") in error
    assert "data.max_bad_share" in error
    assert len(metrics(tmp_path / "run")) == 1  # the first step had fewer than 100 draws
    assert len({line["draw"] for line in record(tmp_path / "run")}) == int(found[1])
    options |= {"data__max_bad_share": 0.2, "train__steps": 2}
    assert uptrain.main(words_of(checkpoint, rows, tmp_path / "run", **options)) == 0


def test_all_processes_end_in_the_same_step(checkpoint: Path, world: Path, tmp_path: Path) -> None:
    """Rows of which so many are bad that the second process soon meets two in a row; the first says it, and ends."""
    rows = rows_with(tmp_path, world, bad=6)
    samples = samples_of(rows, world)
    bad = {number for number, sample in enumerate(samples) if sample.id.startswith("bad")}

    def gives_up(draw: int, seed: int) -> bool:
        return {DrawOrder(len(samples), seed).row(draw, attempt) for attempt in (0, 1)} <= bad

    seed = next(seed for seed in range(100) if gives_up(3, seed) and not any(gives_up(d, seed) for d in range(3)))
    options = {
        "data__media_root": world.parent,
        "data__allow_outside": True,
        "data__max_bad_in_a_row": 2,
        "train__batch_size": 1,
        "seed": seed,
    }
    done = torchrun(words_of(checkpoint, rows, tmp_path / "run", **options), 2)
    assert done.returncode == 1
    codes = re.findall(r"exitcode\s*:\s*(-?\d+)", done.stderr)
    assert codes, done.stderr[-4000:]
    assert "3" in codes, done.stderr[-4000:]  # the other one leaves with 3, too, or is ended by torchrun first
    assert done.stderr.count("error: too many bad samples: 2 samples in a row are bad") == 1
    assert {line["draw"] for line in record(tmp_path / "run") if line["shown"] is None} == {3}
    assert len(metrics(tmp_path / "run")) == 1  # draws 2 and 3 are of the second step
    options["train__batch_size"] = 2
    alone = Run(recipe_of(words_of(checkpoint, rows, tmp_path / "one", **options)))
    with pytest.raises(BudgetError, match="2 samples in a row"):
        alone.train()
    assert record(tmp_path / "one") == record(tmp_path / "run")
