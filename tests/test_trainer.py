"""Training in one process: metrics, accumulation, resumption, tracking and pictures."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from evs_train.errors import MediaError, RecipeError
from evs_train.trainer import bucket_name, bucket_of
from evs_train.uptrain import Run, Summary
from tests.runs import arguments, metrics, recipe_of

UNIFORM = {"kind": "uniform", "min": 0.0, "max": 0.9}


@pytest.fixture
def train(tiny_checkpoint: Callable[[str], Path], world: Path, tmp_path: Path) -> Callable[..., tuple[Path, Summary]]:
    def run(name: str, family: str = "qwen3_vl", **overrides: Any) -> tuple[Path, Summary]:
        output = tmp_path / name
        settings = {"train__steps": 4, "train__batch_size": 4, "evs__rate": UNIFORM, **overrides}
        words = arguments(tiny_checkpoint(family), world, output, **settings)
        return output, Run(recipe_of(words)).train()

    return run


def test_metrics_say_what_was_pruned(train: Callable[..., tuple[Path, Summary]]) -> None:
    output, summary = train("run", train__steps=6, train__log_every=2)
    lines = metrics(output)
    assert [line["step"] for line in lines] == [1, 2, 4, 6]
    for line in lines:
        assert 0 <= line["evs/rate"] < 0.9
        assert 0 < line["evs/video_tokens_after"] <= line["evs/video_tokens_before"]
        assert line["speed/tokens_per_second"] > 0
        assert line["speed/samples_per_second"] > 0
        assert line["memory/peak_gib"] > 0
        assert line["lr/vision"] != line["lr/language_model"] or line["step"] == 6
        assert all(line[f"time/{name}"] >= 0 for name in ("data", "encoder", "pruning", "rest"))
    assert summary.steps == 6
    assert (summary.first_loss, summary.last_loss) == (lines[0]["loss"], lines[-1]["loss"])
    assert summary.video_tokens_before == sum(line["evs/video_tokens_before"] for line in lines)
    assert summary.video_tokens_after == sum(line["evs/video_tokens_after"] for line in lines)
    record = json.loads((output / "record.json").read_text())
    assert record["recipe"]["evs"]["rate"] == UNIFORM
    assert record["pruning_rates"]["kind"] == "uniform"
    assert len(record["data_fingerprint"]) == 64
    assert (
        record["versions"]["torch"] == torch.__version__.split("+")[0]
        or record["versions"]["torch"] == torch.__version__
    )


def test_the_last_steps_are_logged_whatever_the_interval(train: Callable[..., tuple[Path, Summary]]) -> None:
    output, summary = train("run", train__steps=4, train__log_every=3)
    assert [line["step"] for line in metrics(output)] == [1, 3, 4]
    assert summary.last_loss == metrics(output)[-1]["loss"]


def test_the_loss_by_rate_is_the_loss(train: Callable[..., tuple[Path, Summary]]) -> None:
    """One rate per step: the bucket of that rate holds the whole loss."""
    output, _ = train("run")
    for line in metrics(output):
        buckets = {name: value for name, value in line.items() if name.startswith("loss/")}
        assert list(buckets) == [bucket_name(bucket_of(line["evs/rate"]))]
        assert next(iter(buckets.values())) == pytest.approx(line["loss"], rel=1e-5)


def test_one_rate_per_sample_fills_several_buckets(train: Callable[..., tuple[Path, Summary]]) -> None:
    output, _ = train("run", evs__scope="sample", train__steps=1, train__batch_size=8)
    (line,) = metrics(output)
    buckets = [value for name, value in line.items() if name.startswith("loss/")]
    assert len(buckets) > 1
    assert min(buckets) - 1e-5 <= line["loss"] <= max(buckets) + 1e-5


@pytest.mark.parametrize(("rate", "bucket"), [(0.0, 0), (1e-9, 1), (0.25, 1), (0.5, 2), (0.51, 3), (0.99, 4)])
def test_buckets(rate: float, bucket: int) -> None:
    assert bucket_of(rate) == bucket


def test_accumulation_does_not_change_loss_or_gradient(
    family_name: str, train: Callable[..., tuple[Path, Summary]]
) -> None:
    whole, _ = train("whole", family_name, train__batch_size=4, train__grad_accumulation=1)
    split, _ = train("split", family_name, train__batch_size=1, train__grad_accumulation=4)
    residuals = []
    for one, other in zip(metrics(whole), metrics(split), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=2e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-4)
        residuals.append(other["loss"] - one["loss"])
    assert abs(sum(residuals) / len(residuals)) < 1e-4


def test_gradient_checkpointing_does_not_change_the_curve(
    family_name: str, train: Callable[..., tuple[Path, Summary]]
) -> None:
    plain, _ = train("plain", family_name)
    checkpointed, _ = train("checkpointed", family_name, train__gradient_checkpointing=True)
    assert [m["loss"] for m in metrics(plain)] == pytest.approx([m["loss"] for m in metrics(checkpointed)], rel=1e-6)


def test_a_resumed_run_goes_on_as_if_never_stopped(train: Callable[..., tuple[Path, Summary]]) -> None:
    whole, _ = train("whole", train__save_every=2)
    resumed, _ = train("resumed", train__save_every=2)
    for folder in (resumed / "checkpoint-4", resumed / "final"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    before = metrics(resumed)
    (resumed / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in before[:2]))
    train("resumed", train__save_every=2, train__resume=True)
    keys = ("step", "loss", "grad_norm", "evs/rate", "evs/video_tokens_after")
    assert [[m[k] for k in keys] for m in metrics(resumed)] == [[m[k] for k in keys] for m in metrics(whole)]


def test_a_new_run_keeps_the_metrics_of_the_old_one(train: Callable[..., tuple[Path, Summary]]) -> None:
    output, _ = train("run", train__steps=1)
    first = (output / "metrics.jsonl").read_text()
    train("run", train__steps=2)
    kept = [path for path in output.glob("metrics.*.jsonl") if path.name != "metrics.jsonl"]
    assert [path.read_text() for path in kept] == [first]
    assert len(metrics(output)) == 2


def test_pictures_of_kept_patches_are_drawn(family_name: str, train: Callable[..., tuple[Path, Summary]]) -> None:
    output, _ = train("run", family_name, train__pictures_every=2, evs__rate=0.6)
    steps = sorted({path.name.split("_")[0] for path in (output / "pictures").glob("*.png")})
    assert steps == ["step000001", "step000003"]
    for path in (output / "pictures").glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 100


def test_wandb_runs_offline_without_a_key(
    train: Callable[..., tuple[Path, Summary]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    output, _ = train("run", tracking__wandb=True, train__pictures_every=2)
    import wandb

    wandb.teardown()  # ends the service process, which writes the file
    assert os.environ["WANDB_MODE"] == "offline"
    (file,) = output.glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    for name in (b"evs/video_tokens_after", b"evs/kept", b"lr/vision", b"tuning", b"pictures_every"):
        assert name in content, name


def test_a_bad_row_ends_training_with_its_name(
    tiny_checkpoint: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "Nothing."}]
    rows.write_text(json.dumps({"id": "bad", "video": "broken.mp4", "conversations": turns}) + "\n")
    for workers in (0, 1):
        words = arguments(
            tiny_checkpoint("qwen3_vl"), rows, tmp_path / "out", data__num_workers=workers, train__steps=1
        )
        with pytest.raises(MediaError, match=r"broken\.mp4"):
            Run(recipe_of(words)).train()


def test_a_nan_is_not_hidden(train: Callable[..., tuple[Path, Summary]]) -> None:
    """transformers replaces NaN by the mean loss in its logs unless told otherwise."""
    output, _ = train("run", optim__lr=1e12, optim__max_grad_norm=1e12, optim__scheduler="constant")
    assert any(math.isnan(line["loss"]) for line in metrics(output))


def test_resuming_from_nothing_is_refused(train: Callable[..., tuple[Path, Summary]]) -> None:
    with pytest.raises(RecipeError, match=r"train\.resume"):
        train("run", train__resume=True)
