"""`evs-train check` says what training then counts, and refuses what training refuses, without GPU or weights."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evs_train import cli
from evs_train.check import RATES, Report, check
from evs_train.config import Recipe
from evs_train.data.index import index_file
from evs_train.data.lengths import PlannedRow
from evs_train.data.template import IGNORE_INDEX
from evs_train.errors import EvsTrainError
from evs_train.uptrain import Run
from tests.runs import ROOT, arguments, metrics, recipe_of


@pytest.fixture
def recipe(tiny_checkpoint: Callable[[str], Path], mixed_rows: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(family: str = "qwen3_vl", rows: Path = mixed_rows, **options: Any) -> Recipe:
        settings = {"data__index": tmp_path / "media.arrow", **options}
        return recipe_of(arguments(tiny_checkpoint(family), rows, tmp_path / "run", **settings))

    return make


@pytest.fixture
def bad_rows(world: Path, mixed_rows: Path, tmp_path: Path) -> Path:
    """Three good rows, a torn video, an image that is none, and a row that the template does not follow."""
    rows = json.loads(mixed_rows.read_text(encoding="utf-8"))
    for row in rows:
        for kind in ("video", "image"):
            files = row.get(kind, [])
            files = [files] if isinstance(files, str) else files
            row[kind] = [str(mixed_rows.parent / file) for file in files]
    (tmp_path / "torn.mp4").write_bytes((mixed_rows.parent / "wide.mp4").read_bytes()[:1500])
    (tmp_path / "note.png").write_text("no image", encoding="utf-8")
    rows[0]["video"][1] = str(tmp_path / "torn.mp4")
    rows[1]["image"] = [str(tmp_path / "note.png")]
    rows.append({"id": "empty", "messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": ""}]})
    rows[-1]["messages"][0]["content"] = "Say <|video_pad|>."
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def test_a_planned_row_is_what_training_reads(family_name: str, recipe: Callable[..., Recipe]) -> None:
    run = Run(recipe(family_name, data__num_frames=None, data__fps=5))
    report = check(run, num_workers=0)
    assert report.refused == []
    for number, row in enumerate(run.plan(num_workers=0)):
        example = run.reader.read(number)
        assert isinstance(row, PlannedRow)
        videos = [item for item in example.items if item.kind == "video"]
        assert row.sample_id == example.sample_id
        assert row.full.num_tokens == len(example.input_ids)
        assert row.full.num_supervised == int((example.labels != IGNORE_INDEX).sum())
        assert row.full.num_units == tuple(video.num_units for video in videos)
        assert row.full.tokens_per_unit == tuple(video.tokens_per_unit for video in videos)
    assert any(trained for _, trained in report.labels)
    assert report.memory.total > 0


@pytest.mark.parametrize("cap", [True, False])
@pytest.mark.parametrize("rate", RATES[1:])
def test_expected_tokens_are_those_that_training_counts(
    recipe: Callable[..., Recipe], world: Path, tmp_path: Path, rate: float, cap: bool
) -> None:
    options = {"evs__rate": rate, "evs__cap": cap, "train__batch_size": 3, "train__steps": 7, "rows": world}
    run = Run(recipe(**options))
    assert len(run.samples) == 21  # one pass
    report = check(run, num_workers=0)
    summary = Run(recipe(**options)).train()
    assert report.tokens["0"]["video_tokens"] == summary.video_tokens_before
    assert report.tokens[f"{rate:g}"]["video_tokens"] == summary.video_tokens_after
    lines = metrics(tmp_path / "run")
    assert summary.tokens_per_second * summary.seconds == pytest.approx(report.tokens[f"{rate:g}"]["all_tokens"])
    supervised = sum(line["evs/supervised_tokens"] for line in lines)
    assert supervised == pytest.approx(report.supervised_share * report.tokens["0"]["all_tokens"])
    assert report.num_steps == 7


def test_two_processes_find_the_same(recipe: Callable[..., Recipe], bad_rows: Path) -> None:
    one = check(Run(recipe(rows=bad_rows)), num_workers=0)
    index_file(recipe().data).unlink()
    assert check(Run(recipe(rows=bad_rows)), num_workers=2) == one
    again = check(Run(recipe(rows=bad_rows)), num_workers=0)
    assert again.counts == one.counts | {"media_read": 0}
    assert again.refused == one.refused


def test_what_is_refused_is_what_training_refuses(recipe: Callable[..., Recipe], bad_rows: Path) -> None:
    run = Run(recipe(rows=bad_rows, data__on_error="raise", data__max_length=200))
    report = check(run, num_workers=0)
    errors = {}
    for number, sample in enumerate(run.samples):
        try:
            run.reader.read(number)
        except EvsTrainError as error:
            errors[sample.id] = error
    assert {one.sample_id for one in report.refused} == set(errors) == {"two", "image", "empty"}
    for one in report.refused:
        assert one.message == errors[one.sample_id].message
        assert one.reason == errors[one.sample_id].reason  # type: ignore[attr-defined]
    files = {one.sample_id: one.file for one in report.refused}
    assert files == {
        "two": str(bad_rows.parent / "torn.mp4"),
        "image": str(bad_rows.parent / "note.png"),
        "empty": None,
    }
    assert report.counts["rows_refused"] == 3
    short = check(Run(recipe(data__max_length=100)), num_workers=0)
    assert {one.reason for one in short.refused} == {"too long"}
    assert "data.max_length = 100" in short.refused[0].message


def test_counts_and_percentiles(recipe: Callable[..., Recipe]) -> None:
    report = check(Run(recipe()), num_workers=0)
    assert report.counts == {
        "rows": 5, "rows_with_video": 3, "rows_with_images_only": 1, "rows_of_text": 1, "rows_refused": 0,
        "videos": 4, "images": 1, "media_read": 5,
    }  # fmt: skip
    assert report.backends == {"decord": 4}
    assert report.as_json()["backends"] == report.backends
    assert report.seconds["100"] == 18 / 8
    assert report.resolutions["100"] == [96, 64]
    assert report.row_tokens["100"] == report.longest[0][1] == max(count for _, count in report.longest)
    assert report.longest[0][0] in ("two", "both")
    answer = "".join(text for text, trained in report.labels if trained)
    assert "A red circle." in answer
    assert "Left." in answer
    assert "Where?" not in answer
    assert "[" in "".join(text for text, trained in report.labels if not trained)


def test_logits_are_counted_for_the_most_supervised_tokens(recipe: Callable[..., Recipe]) -> None:
    """Of the rows, or of the planned micro-batches; and for every pass of a step."""
    run = Run(recipe(train__batch_size=2))
    *_, second, first = sorted(row.full.num_supervised for row in run.plan(num_workers=0))  # type: ignore[union-attr]
    assert check(run, num_workers=0).memory.num_logits == second + first
    for kind, num_passes in (("teacher", 2), ("sandwich", 3)):
        several = Run(recipe(train__batch_size=2, objective={"kind": kind}))
        assert check(several, num_workers=0).memory.num_logits == num_passes * (second + first)
    planned = check(Run(recipe(train__batch_size=1, data__max_tokens_per_batch=500)), num_workers=0)
    assert planned.usage is not None
    assert planned.memory.num_logits == planned.usage.most_supervised >= first


def test_patches_are_counted_for_the_rows_with_the_most(recipe: Callable[..., Recipe]) -> None:
    """Of the rows, or of the planned micro-batches. Qwen's merger makes a token of four."""
    run = Run(recipe(train__batch_size=2))
    rows = [row.full for row in run.plan(num_workers=0) if isinstance(row, PlannedRow)]
    video = sum(sorted(row.num_video_tokens for row in rows)[-2:])
    image = sum(sorted(row.num_image_tokens for row in rows)[-2:])
    assert min(video, image) > 0
    assert check(run, num_workers=0).memory.num_patches == 4 * (video + image)
    planned = check(Run(recipe(train__batch_size=1, data__max_tokens_per_batch=500)), num_workers=0)
    assert planned.usage is not None
    assert planned.usage.most_image_tokens >= max(row.num_image_tokens for row in rows)
    assert planned.memory.num_patches == 4 * (planned.usage.most_video_tokens + planned.usage.most_image_tokens)


def test_a_folder_that_cannot_be_written(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    run = Run(recipe(data__index=tmp_path / "file" / "media.arrow"))
    report = check(run, num_workers=0)
    assert report.index.startswith(f"not saved: {tmp_path / 'file' / 'media.arrow'}: ")
    assert report.counts["media_read"] == 5


class TestCommand:
    """As it is typed."""

    @pytest.fixture
    def words(self, tiny_checkpoint: Callable[[str], Path], bad_rows: Path, tmp_path: Path) -> list[str]:
        index = {"data__index": tmp_path / "media.arrow"}
        return ["check", *arguments(tiny_checkpoint("qwen3_vl"), bad_rows, tmp_path / "run", **index)]

    def test_json_is_all_of_stdout(self, words: list[str], capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert cli.main([*words, "--json", "processes=4"]) == 0
        printed = capfd.readouterr()
        report = json.loads(printed.out)
        assert set(report) >= set(Report.__dataclass_fields__)
        assert sum(report["refused_by_reason"].values()) == len(report["refused"]) == 3
        assert report["memory"]["num_processes"] == 4
        assert report["rows_per_step"] == 4 * recipe_of(words[1:]).train.batch_size
        assert "media" in printed.err
        assert not (tmp_path / "run").exists()

    def test_for_people(self, words: list[str], capfd: pytest.CaptureFixture[str], bad_rows: Path) -> None:
        assert cli.main([*words, "--strict"]) == 2
        printed = " ".join(capfd.readouterr().out.split())
        assert "3 rows are refused" in printed
        assert f"{bad_rows} row 1: {bad_rows.parent / 'torn.mp4'}: " in printed
        assert "A square." in printed
        for rate in RATES:
            assert f"│ {rate:g} │" in printed

    def test_strict_without_refused_rows(
        self, words: list[str], mixed_rows: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main([*words, f"data.rows={mixed_rows}", "--strict"]) == 0
        assert "No row is refused." in capfd.readouterr().out

    @pytest.mark.parametrize(
        ("extra", "error"),
        [
            (["--jsn"], "error: unknown option '--jsn'"),
            (["processes=0"], "error: processes must be a number of at least 1, got '0'"),
            (["model.path=/no/such"], "error: the checkpoint /no/such does not exist"),
        ],
    )
    def test_mistakes(self, words: list[str], extra: list[str], error: str, capfd: pytest.CaptureFixture[str]) -> None:
        assert cli.main([*words, *extra]) == 2
        assert error in capfd.readouterr().err

    def test_a_malformed_recipe_is_answered_at_once(self) -> None:
        """In a second of the processor's time, which other processes do not lengthen; torch alone takes longer."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "evs_train.cli", "check", "recipe=tiny", "evs.rat=0.5", "tran.steps=1", "seed=-1"],
            cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
        assert done.returncode == 2
        assert "3 fault(s)" in done.stderr
        for fault in ("evs.rat: unknown key", "tran: unknown key", "seed: "):
            assert fault in done.stderr
