"""The arithmetic of PruneVid's own check: operations, bounds, the published rule for segments, the written file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.prunevid import (
    MODELS,
    RESULT,
    Model,
    extremes,
    layers_before,
    left_of,
    measured,
    pixels,
    repaired,
    same_segments,
    static_share,
    tower,
)

ONEVISION, PLLAVA = MODELS
SMALL = Model("small", 8, 4, 4, 8, 8, 8, retained=0.15, operations=0.2)


def test_operations_are_those_of_the_layers() -> None:
    assert ONEVISION.of_dense(1.0, 1.0, 5) == pytest.approx(1.0)
    tokens, linear = 6272, 2 * 3584 * (3584 + 512) + 3 * 3584 * 18944
    dense = tokens * linear + 2 * tokens**2 * 3584
    half = tokens / 2 * linear + 2 * (tokens / 2) ** 2 * 3584
    assert ONEVISION.of_dense(1.0, 0.5, 7) == pytest.approx((7 * dense + 21 * half) / (28 * dense))


def test_the_published_operations_come_out_for_one_model_and_not_for_the_other() -> None:
    assert round(PLLAVA.of_dense(0.162 / 0.4, 0.162, 11), 2) == PLLAVA.operations == 0.23
    assert [round(ONEVISION.of_dense(0.17 / 0.4, 0.17, layers), 2) for layers in (9, 10, 11)] == [0.22, 0.23, 0.24]
    assert (layers_before(32), layers_before(28)) == (10, 8)


def test_extremes_bound_what_is_left() -> None:
    """Still: 196 tokens of 6272, half of them, .4 of those. Moving: half of each frame's 196, 39 of those 98."""
    found = {
        (left.video, left.segments): left
        for name, e in extremes(ONEVISION).items()
        for left in left_of(ONEVISION, name, "", e)
    }
    for rule in ("ours", "published"):
        still, moving = found["nothing changes", rule], found["everything changes", rule]
        assert (still.static, still.over_time, still.merged) == (1.0, 1 / 32, 98 / 6272)
        assert (moving.static, moving.over_time, moving.merged) == (0.0, 1.0, 0.5)
        assert (still.retained, moving.retained) == (39 / 6272, 32 * 39 / 6272)
        assert still.retained < ONEVISION.retained < moving.retained


def test_the_published_ratio_needs_few_static_places() -> None:
    share = static_share(ONEVISION, 4)
    assert 0.5 * 0.4 * (share / 4 + 1 - share) == pytest.approx(0.17)
    assert round(static_share(PLLAVA, 4), 3) == 0.253


@pytest.mark.parametrize(
    ("labels", "segments"),
    [
        ("aabbb", "aabbb"),
        ("abcd", "\0\0\0\0"),
        ("aabaaabb", "aaaaaabb"),
        ("bbacc", "bbbcc"),
        ("bbaccc", "bbcccc"),
        ("abbcc", "bbbcc"),
        ("bbabbbdccc", "bbbbbbbccc"),
        ("bbabbdcccc", "bbbbbbcccc"),  # what the first gap joined makes five b, more than the c behind the second
    ],
)
def test_published_segments(labels: str, segments: str) -> None:
    assert repaired([ord(label) for label in labels]) == [ord(label) for label in segments]


def test_our_segments_are_the_published_ones_unless_gaps_meet() -> None:
    assert same_segments(0.0, 50) > 0.9
    assert same_segments(0.1, 50) > 0.8


def test_features_follow_the_content() -> None:
    """A clip whose left half stands still: its places are alike over time, the others' are not."""
    frames = torch.rand(4, 3, 384, 384, generator=torch.Generator().manual_seed(0)) * 2 - 1
    frames[:, :, :, :192] = frames[:1, :, :, :192]
    for features, side in ((pixels, 14), (pixels, 12), (tower, 12)):
        embeds = features(frames, side)
        assert embeds.shape[:2] == (4, side**2)
        change = (embeds[1:] - embeds[:-1]).square().sum(-1).mean(0).view(side, side)
        assert float(change[:, : side // 2].max()) < float(change[:, -side // 2 :].min())


def test_one_row_is_measured_without_clips(tmp_path: Path) -> None:
    found = measured(SMALL, tmp_path)
    assert [one["video"] for one in found["found"]] == ["nothing changes"] * 2 + ["everything changes"] * 2
    assert json.loads(json.dumps(found)) == found


def test_the_written_file_is_of_this_table() -> None:
    written = json.loads(RESULT.read_text(encoding="utf-8"))
    for model, row in zip(MODELS, written["table"], strict=True):
        assert row["model"] == model.name
        assert row["published"] == {"retained": model.retained, "operations": model.operations}
        for left in row["found"]:
            assert left["segments"] in ("ours", "published")
            assert 0 < left["retained"] <= 0.2
