"""Training in one process: metrics, accumulation, resumption, tracking and pictures."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers.modeling_layers import GradientCheckpointingLayer

from evs_train.errors import MediaError, RecipeError
from evs_train.models import FAMILIES
from evs_train.models.base import Family
from evs_train.models.tuning import part_of
from evs_train.tally import bucket_name, bucket_of
from evs_train.uptrain import Run, Summary
from tests.runs import STILL, arguments, assert_only_rounding, metrics, recipe_of

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
        assert line["data/decoded/decord"] > 0
        assert line["data/decoded/pyav"] == line["data/decoded/images"] == 0
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
    """Rows without video and rows pruned at the step's rate; with one row a step, one bucket holds the whole loss."""
    output, _ = train("run", train__batch_size=1, train__steps=8)
    seen = set()
    for line in metrics(output):
        buckets = {name: value for name, value in line.items() if name.startswith("loss/")}
        applied = line["evs/rate_applied"] if line["evs/video_tokens_before"] else None
        assert list(buckets) == [bucket_name(bucket_of(applied))]
        assert next(iter(buckets.values())) == pytest.approx(line["loss"], rel=1e-5)
        seen |= buckets.keys()
    assert "loss/no_video" in seen
    assert len(seen) > 2


def test_one_rate_per_sample_fills_several_buckets(train: Callable[..., tuple[Path, Summary]]) -> None:
    output, _ = train("run", evs__scope="sample", train__steps=1, train__batch_size=8)
    (line,) = metrics(output)
    buckets = [value for name, value in line.items() if name.startswith("loss/")]
    assert len(buckets) > 1
    assert min(buckets) - 1e-5 <= line["loss"] <= max(buckets) + 1e-5


@pytest.mark.parametrize(
    ("rate", "bucket"), [(None, 5), (0.0, 0), (1e-9, 1), (0.25, 1), (0.5, 2), (0.51, 3), (0.99, 4)]
)
def test_buckets(rate: float | None, bucket: int) -> None:
    assert bucket_of(rate) == bucket


def test_accumulation_does_not_change_loss_or_gradient(
    family_name: str, train: Callable[..., tuple[Path, Summary]]
) -> None:
    """transformers would take the mean of the micro-batches' means where a class says `accepts_loss_kwargs = False`."""
    options = {"train__steps": 8, **STILL}
    whole, _ = train("whole", family_name, train__batch_size=4, train__grad_accumulation=1, **options)
    split, _ = train("split", family_name, train__batch_size=1, train__grad_accumulation=4, **options)
    assert_only_rounding(metrics(whole), metrics(split))


@pytest.mark.parametrize(
    "family_name", sorted(name for name, f in FAMILIES.items() if f.attention_only), indirect=False
)
def test_packing_does_not_change_loss_or_gradient(family_name: str, train: Callable[..., tuple[Path, Summary]]) -> None:
    padded, _ = train("padded", family_name, evs__scope="sample", **STILL)
    packed, _ = train("packed", family_name, evs__scope="sample", train__packing=True, **STILL)
    for one, other in zip(metrics(padded), metrics(packed), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=2e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-4)
        assert one["evs/padding"] > other["evs/padding"] == 0
        by_rate = {name: value for name, value in one.items() if name.startswith("loss/")}
        assert {name: other[name] for name in by_rate} == pytest.approx(by_rate, rel=2e-5)


def test_gradient_checkpointing_recomputes_and_does_not_change_the_curve(
    family_name: str, tiny_checkpoint: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    curves, calls = [], []
    for checkpointing in (False, True, ["language_model"], ["vision"]):
        output = tmp_path / str(checkpointing)
        options = {"train__steps": 2, "train__batch_size": 2, "train__gradient_checkpointing": checkpointing}
        run = Run(recipe_of(arguments(tiny_checkpoint(family_name), world, output, **options)))
        model, count = run.load_model(), [0, 0]
        for place, part in enumerate(("language_model", "vision")):
            linear = _linear_of_a_layer(model, run.family, part)
            linear.register_forward_pre_hook(lambda *_, c=count, p=place: c.__setitem__(p, c[p] + 1))
        run.load_model = lambda model=model: model  # type: ignore[method-assign]
        run.train()
        curves.append([line["loss"] for line in metrics(output)])
        calls.append(count)
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-6)
    language, vision = calls[0]
    assert calls[1:] == [[2 * language, 2 * vision], [2 * language, vision], [language, 2 * vision]]


def test_a_part_without_layers_that_recompute_is_named(train: Callable[..., tuple[Path, Summary]]) -> None:
    with pytest.raises(RecipeError, match="projector of qwen3_vl has no layer that recomputes"):
        train("run", train__gradient_checkpointing=["projector"])


def _linear_of_a_layer(model: torch.nn.Module, family: Family, part: str) -> torch.nn.Linear:
    """The first linear layer of a part's first layer that can recompute."""
    layer = next(
        module
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer) and part_of(name + ".", family) == part
    )
    return next(module for module in layer.modules() if isinstance(module, torch.nn.Linear))


def test_a_frozen_tower_has_no_backward_pass_where_activations_are_recomputed(
    family_name: str, tiny_checkpoint: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    options = {"train__steps": 1, "train__gradient_checkpointing": True, "tuning__freeze": ["vision"]}
    run = Run(recipe_of(arguments(tiny_checkpoint(family_name), world, tmp_path / "run", **options)))
    model, waiting = run.load_model(), {}
    vision, projector = run.family.parts["vision"], run.family.parts["projector"]

    def hook_of(name: str) -> Callable[..., None]:
        return lambda _, args, out: waiting.update({name: getattr(out, "requires_grad", False)})

    for name, module in model.named_modules():
        if f"{name}.".startswith(vision) and not f"{name}.".startswith(projector) and not list(module.children()):
            module.register_forward_hook(hook_of(name))
    run.load_model = lambda: model  # type: ignore[method-assign]
    run.train()
    assert waiting
    assert not any(waiting.values()), waiting


def test_a_resumed_run_goes_on_as_if_never_stopped(train: Callable[..., tuple[Path, Summary]]) -> None:
    whole, _ = train("whole", train__save_every=2)
    resumed, _ = train("resumed", train__save_every=2)
    for folder in (resumed / "checkpoint-4", resumed / "final"):
        shutil.rmtree(folder)
    train("resumed", train__save_every=2, train__resume=True)
    keys = ("step", "loss", "grad_norm", "evs/rate", "evs/video_tokens_after")
    assert [[m[k] for k in keys] for m in metrics(resumed)] == [[m[k] for k in keys] for m in metrics(whole)]


def test_a_new_run_sets_the_older_one_aside(train: Callable[..., tuple[Path, Summary]]) -> None:
    """Nothing of it may pass for the new run's: not its final weights, nor a checkpoint with a higher number."""
    output, _ = train("run", train__steps=2, train__save_every=1)
    first = (output / "metrics.jsonl").read_text()
    train("run", train__steps=1, train__save_every=1)
    (older,) = (output / "older").iterdir()
    assert (older / "metrics.jsonl").read_text() == first
    assert {"record.json", "final", "checkpoint-1", "checkpoint-2"} <= {path.name for path in older.iterdir()}
    assert len(metrics(output)) == 1
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 7}, "seed (was 0, is 7)"),
        ({"evs__scope": "sample"}, "evs.scope (was batch, is sample)"),
        ({"train__batch_size": 2}, "step (was 4 rows, is 2 rows)"),
    ],
)
def test_resuming_another_run_is_refused(
    train: Callable[..., tuple[Path, Summary]], change: dict[str, Any], named: str
) -> None:
    train("run", train__save_every=2)
    with pytest.raises(RecipeError, match=re.escape(named)):
        train("run", train__save_every=2, train__resume=True, **change)


def test_resuming_a_finished_run_is_refused(train: Callable[..., tuple[Path, Summary]]) -> None:
    train("run", train__save_every=2)
    with pytest.raises(RecipeError, match="end of the run"):
        train("run", train__save_every=2, train__resume=True)


def test_pictures_of_kept_patches_are_drawn(family_name: str, train: Callable[..., tuple[Path, Summary]]) -> None:
    output, _ = train("run", family_name, train__pictures_every=2, evs__rate=0.6)
    steps = sorted({path.name.split("_")[0] for path in (output / "pictures").glob("*.png")})
    assert steps == ["step000001", "step000003"]
    for path in (output / "pictures").glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 100


def test_a_bad_row_ends_training_with_its_name(
    tiny_checkpoint: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "Nothing."}]
    rows.write_text(json.dumps({"id": "bad", "video": "broken.mp4", "conversations": turns}) + "\n")
    for workers in (0, 1):
        words = arguments(
            tiny_checkpoint("qwen3_vl"),
            rows,
            tmp_path / "out",
            data__on_error="raise",
            data__num_workers=workers,
            train__steps=1,
        )
        with pytest.raises(MediaError, match=r"broken\.mp4"):
            Run(recipe_of(words)).train()


def test_resuming_from_nothing_is_refused(train: Callable[..., tuple[Path, Summary]]) -> None:
    with pytest.raises(RecipeError, match=r"train\.resume"):
        train("run", train__resume=True)


def test_every_recipe_key_reaches_the_trainer(
    tiny_checkpoint: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    """Each value differs from its default, in the recipe and in transformers."""
    words = arguments(
        tiny_checkpoint("qwen3_vl"),
        world,
        tmp_path / "run",
        seed=3,
        evs__score="embeds",
        evs__score_dtype="float32",
        optim__lr=0.002,
        optim__lr_by_part={"projector": 0.005},
        optim__weight_decay=0.1,
        optim__betas=[0.8, 0.9],
        optim__warmup_ratio=0.5,
        optim__scheduler="linear",
        optim__max_grad_norm=0.3,
        train__steps=6,
        train__batch_size=2,
        train__grad_accumulation=3,
        train__save_every=4,
        train__keep_checkpoints=5,
    )
    trainer = Run(recipe_of(words)).build_trainer()
    args, hook = trainer.args, trainer.hook
    assert (args.seed, args.weight_decay, args.adam_beta1, args.adam_beta2) == (3, 0.1, 0.8, 0.9)
    assert (args.warmup_steps, args.lr_scheduler_type, args.max_grad_norm) == (3, "linear", 0.3)
    assert (args.max_steps, args.per_device_train_batch_size, args.gradient_accumulation_steps) == (6, 2, 3)
    assert (args.save_steps, trainer.keep_checkpoints, args.logging_nan_inf_filter) == (4, 5, False)
    assert args.save_total_limit is None  # transformers would count checkpoints that are not whole
    assert (hook.engine_score, hook.float32_score, hook.encoder_trains) == (False, True, True)
    assert hook.autocast == trainer.accelerator.autocast
    groups = {group["name"]: group for group in trainer.create_optimizer().param_groups}
    assert (groups["projector"]["lr"], groups["vision"]["lr"]) == (0.005, 0.002)
    assert (groups["projector"]["weight_decay"], groups["projector_no_decay"]["weight_decay"]) == (0.1, 0.0)
