"""Objectives in whole runs of one process: formulas, metrics, and equal losses for any split of a step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evs_train.errors import RecipeError
from evs_train.models import FAMILIES
from evs_train.objectives import supervised_places, teacher_kl
from evs_train.uptrain import Run, Summary
from tests.runs import STILL, arguments, assert_only_rounding, metrics, recipe_of

UNIFORM = {"kind": "uniform", "min": 0.3, "max": 0.9}
TEACHER: dict[str, Any] = {"kind": "teacher", "teacher_weight": 10.0, "temperature": 2.0}  # KL is about 1e-4 here
SANDWICH = {"kind": "sandwich", "lowest": 0.1, "highest": 0.8}
BOTH = pytest.mark.parametrize("objective", [TEACHER, SANDWICH], ids=["teacher", "sandwich"])

FAMILY = pytest.mark.parametrize("family", ["qwen3_vl", "llava_onevision", "nemotron_h_omni"])


@pytest.fixture
def train(tiny_checkpoint: Callable[[str], Path], world: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Run and give back its logs."""

    def run(name: str, family: str = "qwen3_vl", **overrides: Any) -> list[dict[str, Any]]:
        settings = {"train__steps": 2, "train__batch_size": 4, "evs__rate": UNIFORM, **STILL, **overrides}
        summary = Run(recipe_of(arguments(tiny_checkpoint(family), world, tmp_path / name, **settings))).train()
        assert isinstance(summary, Summary)
        return metrics(tmp_path / name)

    return run


def test_kl_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = ([math.exp(x / 2) for x in row] for row in (t, s))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        expected += 4 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert teacher_kl(student, teacher, 2.0).item() == pytest.approx(expected, rel=1e-5)


def test_equal_logits_have_no_kl_and_no_gradient() -> None:
    student = torch.randn(7, 100, generator=torch.Generator().manual_seed(0)).requires_grad_()
    kl = teacher_kl(student, student.detach(), 1.5)
    kl.backward()
    assert kl.item() == pytest.approx(0, abs=1e-6)
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-6


def test_supervised_places_predict_the_supervised_tokens() -> None:
    labels = torch.tensor([[-100, 5, -100, 6], [-100, -100, 7, -100]])
    places, targets = supervised_places(labels, 3)
    assert (places.tolist(), targets.tolist()) == ([0, 2, 5], [5, 6, 7])


@FAMILY
def test_the_loss_of_a_teacher_run_is_its_formula(family: str, train: Callable[..., list[dict[str, Any]]]) -> None:
    plain = train("plain", family)
    dense = train("dense", family, evs__rate=0.0)
    for line, alone, unpruned in zip(train("run", family, objective=TEACHER), plain, dense, strict=True):
        assert line["loss/pass_drawn"] == pytest.approx(alone["loss"], rel=1e-5)
        assert line["loss/pass_teacher"] == pytest.approx(unpruned["loss"], rel=1e-5)
        assert line["loss/teacher_kl"] > 1e-5
        assert line["loss"] == pytest.approx(line["loss/pass_drawn"] + 10 * line["loss/teacher_kl"], rel=1e-6)
        by_rate = {name: value for name, value in alone.items() if name.startswith("loss/rate")}
        assert {name: line[name] for name in by_rate} == pytest.approx(by_rate, rel=1e-5)
        for name in ("evs/rate", "evs/video_tokens_after", "evs/supervised_tokens"):
            assert line[name] == alone[name]


@FAMILY
def test_the_loss_of_a_sandwich_run_is_the_mean_of_separate_runs(
    family: str, train: Callable[..., list[dict[str, Any]]]
) -> None:
    rates = {"low": 0.1, "high": 0.8, "drawn": UNIFORM}
    runs = [train(name, family, evs__rate=rate) for name, rate in rates.items()]
    for line, *alone in zip(train("run", family, objective=SANDWICH), *runs, strict=True):
        found = [line[f"loss/pass_{name}"] for name in ("lowest", "highest", "drawn")]
        assert found == pytest.approx([one["loss"] for one in alone], rel=1e-5)
        assert line["loss"] == pytest.approx(sum(found) / 3, rel=1e-5)
        assert line["evs/rate"] == alone[2]["evs/rate"]


def test_an_unpruned_student_learns_nothing_from_its_teacher(train: Callable[..., list[dict[str, Any]]]) -> None:
    """KL and its gradient are rounding: a weight of a thousand changes neither loss nor gradient."""
    plain = train("plain", evs__rate=0.0)
    objective = {"kind": "teacher", "teacher_weight": 1000.0}
    for line, alone in zip(train("run", evs__rate=0.0, objective=objective), plain, strict=True):
        assert abs(line["loss/teacher_kl"]) < 1e-7
        assert line["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-3)


def test_a_teacher_of_no_weight_changes_nothing(train: Callable[..., list[dict[str, Any]]]) -> None:
    """In bfloat16: autocast's copies of weights, made without gradient, must not be used again for the student."""
    plain = train("plain", model__dtype="bfloat16")
    objective = {"kind": "teacher", "teacher_weight": 1e-6}
    for line, alone in zip(train("run", model__dtype="bfloat16", objective=objective), plain, strict=True):
        assert line["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)


@BOTH
@pytest.mark.parametrize("family", ["qwen3_vl", "nemotron_h_omni"])
def test_accumulation_does_not_change_loss_or_gradient(
    objective: dict[str, Any], family: str, train: Callable[..., list[dict[str, Any]]]
) -> None:
    options = {"objective": objective, "train__steps": 8}
    whole = train("whole", family, train__batch_size=2, train__grad_accumulation=1, **options)
    split = train("split", family, train__batch_size=1, train__grad_accumulation=2, **options)
    assert_only_rounding(whole, split)
    names = [name for name in whole[0] if name.startswith("loss/")]
    assert len(names) >= 4
    for one, other in zip(whole, split, strict=True):
        assert [other[name] for name in names] == pytest.approx([one[name] for name in names], rel=2e-5, abs=1e-7)


@BOTH
@pytest.mark.parametrize("family", ["qwen3_vl", "llava_onevision"])
def test_packing_does_not_change_loss_or_gradient(
    objective: dict[str, Any], family: str, train: Callable[..., list[dict[str, Any]]]
) -> None:
    assert FAMILIES[family].attention_only
    padded = train("padded", family, objective=objective, evs__scope="sample")
    packed = train("packed", family, objective=objective, evs__scope="sample", train__packing=True)
    for one, other in zip(padded, packed, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=2e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-4)
        assert one["evs/padding"] > other["evs/padding"] == 0


@BOTH
def test_gradient_checkpointing_and_adapters_with_dropout(
    objective: dict[str, Any], train: Callable[..., list[dict[str, Any]]]
) -> None:
    tuning = {"tuning__method": "lora", "tuning__lora__r": 4}
    options = {"objective": objective, **tuning, "optim__lr": 1e-2, "train__steps": 4}
    stored = train("stored", **options)
    again = train("again", **options, train__gradient_checkpointing=True)
    assert [line["loss"] for line in again] == pytest.approx([line["loss"] for line in stored], rel=1e-5)
    assert stored[-1]["loss"] < stored[0]["loss"]
    dropped = train("dropped", **options, tuning__lora__dropout=0.5)
    assert dropped[-1]["loss"] != stored[-1]["loss"]


def test_resuming_with_another_objective_is_refused(train: Callable[..., list[dict[str, Any]]]) -> None:
    train("run", train__save_every=1, objective=TEACHER)
    with pytest.raises(RecipeError, match=re.escape("objective.kind (was teacher, is sandwich)")):
        train("run", train__save_every=1, train__resume=True, objective=SANDWICH)


def test_a_run_records_its_objective_and_keeps_no_pass(
    tiny_checkpoint: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    """Logits and graphs of further passes would lie in memory while the next step encodes."""
    run = Run(recipe_of(arguments(tiny_checkpoint("qwen3_vl"), world, tmp_path, objective=TEACHER, train__steps=1)))
    trainer = run.build_trainer()
    trainer.train()
    assert trainer.hook.passes == []
    assert run._record()["objective"] == TEACHER | {"lowest": 0.0, "highest": 0.9}
