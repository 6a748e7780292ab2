"""Counts, record and budget of bad samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evs_train.data.quarantine import BadSample, Found, Quarantine
from evs_train.data_config import DataSection
from evs_train.errors import BudgetError, Reason


def quarantine(folder: Path, **options: Any) -> Quarantine:
    return Quarantine(folder / "quarantine.jsonl", DataSection(rows="a.json", **options), lambda step: 10 * step)


def bad(draw: int, attempt: int = 0, reason: Reason = "damaged") -> BadSample:
    return BadSample(draw, draw // 10, attempt, f"s{draw}", f"a.json row {draw}", "a.mp4", reason, "a.mp4: damaged")


def found(one: Quarantine, *samples: BadSample, num_draws: int = 10, none_left: bool = False) -> Found:
    return Found(num_draws, one.lines_of(samples, "other"), none_left)


def test_a_line_says_everything(tmp_path: Path) -> None:
    one = quarantine(tmp_path)
    one.add(found(one, bad(13, 1, "too long"), bad(13), bad(12)), writes=True)
    lines = [json.loads(line) for line in one.path.read_text(encoding="utf-8").splitlines()]
    assert [(line["draw"], line["attempt"]) for line in lines] == [(12, 0), (13, 0), (13, 1)]
    assert lines[2] == {
        "draw": 13, "step": 1, "attempt": 1, "sample": "s13", "row": "a.json row 13", "file": "a.mp4",
        "reason": "too long", "message": "a.mp4: damaged", "shown": "other",
    }  # fmt: skip
    assert one.metrics() == {"data/quarantined": 3, "data/quarantined/damaged": 2, "data/quarantined/too_long": 1}


def test_others_count_but_do_not_write(tmp_path: Path) -> None:
    one = quarantine(tmp_path)
    one.add(found(one, bad(3)), writes=False)
    assert not one.path.exists()
    assert one.metrics()["data/quarantined"] == 1


def test_nothing_bad_writes_nothing(tmp_path: Path) -> None:
    one = quarantine(tmp_path)
    one.add(found(one), writes=True)
    assert not one.path.exists()
    assert one.metrics() == {"data/quarantined": 0}


def test_the_share_is_judged_from_100_draws_on(tmp_path: Path) -> None:
    one = quarantine(tmp_path, max_bad_share=0.02)
    one.add(found(one, bad(0), bad(1), bad(2)), writes=True)
    one.add(found(one, num_draws=89), writes=True)
    with pytest.raises(BudgetError, match=r"3 of 100 draws \(3.0%\) met bad samples; by reason: damaged 3") as raised:
        one.add(found(one, num_draws=1), writes=True)
    assert raised.value.exit_code == 3
    assert str(one.path) in raised.value.message
    assert "data.max_bad_share" in raised.value.hint


def test_a_share_at_the_limit_is_allowed(tmp_path: Path) -> None:
    one = quarantine(tmp_path, max_bad_share=0.02)
    one.add(found(one, bad(0), bad(0, 1), bad(2), num_draws=100), writes=True)  # two draws, one of them twice


def test_none_left_ends_at_once(tmp_path: Path) -> None:
    one = quarantine(tmp_path, max_bad_in_a_row=7)
    with pytest.raises(BudgetError, match="7 samples in a row are bad"):
        one.add(found(one, bad(0), num_draws=1, none_left=True), writes=True)
    assert len(one.path.read_text(encoding="utf-8").splitlines()) == 1


def test_a_resumed_run_counts_on(tmp_path: Path) -> None:
    one = quarantine(tmp_path)
    one.add(found(one, bad(3), bad(12), bad(25), num_draws=30), writes=True)
    for writes in (False, True):
        two = quarantine(tmp_path)
        two.begin(2, writes=writes)
        assert (two.num_draws, two.reasons["damaged"]) == (20, 2)
        assert len(two.path.read_text(encoding="utf-8").splitlines()) == (2 if writes else 3)
    assert [file.name for file in tmp_path.iterdir()] == ["quarantine.jsonl"]
