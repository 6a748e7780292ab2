"""A loss or gradient that is not finite on one of two ranks: nobody steps, samples are named, and a budget ends."""

from __future__ import annotations

import json
import math
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer

from evs_train.collate import BatchPlan
from evs_train.errors import NotFiniteError, RecipeError
from evs_train.finite import NOT_FINITE_FILE, FiniteGuard, have_deepspeed_check
from evs_train.trainer import UptrainTrainer
from launch import uptrain
from tests.faults.number_worker import faulty
from tests.runs import arguments, metrics, recipe_of, torchrun

STEPS = 5
# The second step by its gradient, the fourth by its loss alone.
FAULTS = [
    {"step": 1, "rank": 1, "micro_batch": 1, "kind": "gradient"},
    {"step": 3, "rank": 0, "micro_batch": 0, "kind": "infinite"},
]
WORKER = ("-m", "tests.faults.number_worker")
MODES = (None, "zero2", "zero3", "bfloat16")
UNCHECKED = {
    "bf16": {"enabled": "auto", "check_grad_overflow": False},
    "zero_optimization": {"stage": 2},
    "gradient_clipping": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "zero_allow_untested_optimizer": True,
}
"""A file of DeepSpeed by which it would step on any gradient in bfloat16."""


def words_of(checkpoint: Path, rows: Path, output: Path, **options: Any) -> list[str]:
    settings: dict[str, Any] = {
        "train__steps": STEPS,
        "train__batch_size": 1,
        "train__grad_accumulation": 2,
        "optim__scheduler": "linear",
        "optim__warmup_ratio": 0.0,
        "tuning__freeze": [],
        **options,
    }
    return arguments(checkpoint, rows, output, **settings)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def check_seen(lines: list[dict[str, Any]], skipped: set[int]) -> None:
    """Steps (from 0) change weights, moments and rates, and those of `skipped` none of them."""
    states = [(line["weights"], line["moments"], line["rates"]) for line in lines if "step" in line]
    assert len(states) == STEPS
    assert all(line["finite"] for line in lines if "step" in line)
    for step in range(1, STEPS):
        before, after = states[step - 1], states[step]
        for one, other in zip(before, after, strict=True):
            assert (one == other) == (step in skipped), step


@pytest.fixture(scope="module")
def struck(tiny_checkpoint: Callable[[str], Path], mixed_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two processes: the same faults in each mode, then more than are allowed; their folder and what was said."""
    folder = tmp_path_factory.mktemp("struck")
    checkpoint = tiny_checkpoint("qwen3_vl")
    unchecked = folder / "unchecked.json"
    unchecked.write_text(json.dumps(UNCHECKED), encoding="utf-8")
    options = {mode: {"deepspeed": mode} for mode in MODES}
    options["bfloat16"] = {"deepspeed": unchecked, "model__dtype": "bfloat16"}
    jobs = [
        {
            "words": words_of(checkpoint, mixed_rows, folder / f"run-{mode}", **options[mode]),
            "seen": str(folder / f"seen-{mode}"),
            "faults": FAULTS,
        }
        for mode in MODES
    ]
    jobs.append(
        {
            "words": words_of(checkpoint, mixed_rows, folder / "run-unchecked", **options["bfloat16"]),
            "seen": str(folder / "seen-unchecked"),
            "faults": FAULTS[:1],
            "unchecked": True,
        }
    )
    ending = {"train__max_skipped_steps": 1, "train__save_every": 1, "train__keep_checkpoints": 9}
    jobs.append(
        {
            "words": words_of(checkpoint, mixed_rows, folder / "run-end", **ending),
            "seen": str(folder / "seen-end"),
            "faults": FAULTS,
        }
    )
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    return folder, torchrun([str(file)], 2, timeout=600, program=WORKER)


@pytest.mark.parametrize("mode", MODES)
def test_no_rank_steps(mode: str | None, struck: Any) -> None:
    folder, _ = struck
    for rank in range(2):
        check_seen(lines_of(folder / f"seen-{mode}" / f"{rank}.jsonl"), {fault["step"] for fault in FAULTS})
    logged = metrics(folder / f"run-{mode}")
    assert [(line["step"], line["train/skipped_steps"]) for line in logged] == [(1, 0), (3, 1), (5, 2)]
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in logged)
    expected = metrics(folder / "run-None")
    for one, other in zip(logged, expected, strict=True):
        for name in ("loss", "grad_norm", "learning_rate"):
            assert one[name] == pytest.approx(other[name], rel=0.1 if mode == "bfloat16" else 1e-4), name


def test_without_its_check_deepspeed_steps_on_it(struck: Any) -> None:
    folder, _ = struck
    for rank in range(2):
        lines = lines_of(folder / "seen-unchecked" / f"{rank}.jsonl")
        assert [line["finite"] for line in lines if "step" in line] == [True] + [False] * (STEPS - 1)


@pytest.mark.parametrize("mode", MODES)
def test_the_samples_are_named(mode: str | None, struck: Any) -> None:
    folder, _ = struck
    struck_samples = [
        {**line["fault"], "samples": line["samples"]}
        for rank in range(2)
        for line in lines_of(folder / f"seen-{mode}" / f"{rank}.jsonl")
        if "fault" in line
    ]
    named = lines_of(folder / f"run-{mode}" / NOT_FINITE_FILE)
    assert [line["where"] for line in named] == ["gradient", "loss"]
    assert len(named) == len(struck_samples) == 2
    for line, fault in zip(named, sorted(struck_samples, key=lambda fault: fault["step"]), strict=True):
        assert {name: line[name] for name in ("step", "rank", "micro_batch", "samples")} == {
            name: fault[name] for name in ("step", "rank", "micro_batch", "samples")
        }


def test_too_many_end_the_run_on_all_ranks(struck: Any) -> None:
    folder, done = struck
    codes = re.findall(r"exitcode\s*: (-?\d+)", done.stderr)
    assert done.returncode == 1
    assert codes, done.stderr[-4000:]
    assert set(codes) == {"5"}, done.stderr[-4000:]
    assert done.stderr.count("error: step 3: loss or gradient is not finite (loss; samples ") == 1
    saved = sorted(path.name for path in (folder / "run-end").glob("checkpoint-*"))
    assert saved == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert not (folder / "run-end" / "final").exists()


Train = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def train(tiny_checkpoint: Callable[[str], Path], mixed_rows: Path, tmp_path: Path) -> Train:
    """A run in this process, in which the fourth step's loss, or else the second one's gradient, is struck."""

    def run(kind: str) -> list[dict[str, Any]]:
        fault = {**FAULTS[1 if kind == "infinite" else 0], "rank": 0, "kind": kind}
        words = words_of(tiny_checkpoint("qwen3_vl"), mixed_rows, tmp_path / "run")
        faulty([fault], tmp_path / "seen")(recipe_of(words)).train()
        return lines_of(tmp_path / "seen" / "0.jsonl")

    return run


def test_one_process(train: Train, tmp_path: Path) -> None:
    check_seen(train("infinite"), {3})
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 5]
    assert all(math.isfinite(line["loss"]) for line in metrics(tmp_path / "run"))
    assert [line["where"] for line in lines_of(tmp_path / "run" / NOT_FINITE_FILE)] == ["loss"]


@pytest.mark.parametrize(("kind", "step"), [("infinite", 3), ("gradient", 1)])
def test_without_its_guard_a_step_is_taken(kind: str, step: int, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """The faults are real ones, and each needs its guard."""

    def unchecked(self: FiniteGuard, loss: Tensor, plan: BatchPlan) -> Tensor:
        return loss

    if kind == "infinite":
        monkeypatch.setattr(FiniteGuard, "checked", unchecked)
    else:
        monkeypatch.setattr(UptrainTrainer, "_clip_grad_norm", Trainer._clip_grad_norm)
    with pytest.raises(AssertionError):
        check_seen(train(kind), {step})


def test_a_step_that_was_left_out_would_still_be_logged(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If what it counted were not taken back."""
    monkeypatch.setattr(UptrainTrainer, "_leave_out_step", lambda self: None)
    check_seen(train("infinite"), {3})
    assert {line["step"]: line["loss"] for line in metrics(tmp_path / "run")}[4] == "nan"


def test_weights_that_are_too_large_end_the_run(
    tiny_checkpoint: Callable[[str], Path], mixed_rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing is injected: after the first step every loss is NaN."""
    options = {"optim__lr": 1e30, "optim__lr_by_part": {}, "train__max_skipped_steps": 2, "train__save_every": 1}
    words = words_of(tiny_checkpoint("qwen3_vl"), mixed_rows, tmp_path / "run", train__grad_accumulation=1, **options)
    assert uptrain.main(words) == NotFiniteError.exit_code == 5
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # what is for torchrun's processes is left out without it
    said = capfd.readouterr().err
    assert "error: step 3: loss or gradient is not finite" in said
    assert "3 steps were skipped" in said
    assert f"listed in {tmp_path / 'run' / NOT_FINITE_FILE}" in said
    assert {line["step"] for line in lines_of(tmp_path / "run" / NOT_FINITE_FILE)} == {1, 2, 3}


def test_another_optimizer_of_deepspeed_is_refused() -> None:
    with pytest.raises(RecipeError, match="leads to AdamW, which may step on a gradient that is not finite"):
        have_deepspeed_check(torch.optim.AdamW([torch.zeros(1)]))


def test_a_resumed_run_counts_on(tmp_path: Path) -> None:
    file = tmp_path / NOT_FINITE_FILE
    lines = [{"step": step, "rank": rank, "where": "loss", "samples": ["a"]} for step in (2, 7, 9) for rank in range(2)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    guard = FiniteGuard(file, max_skipped=2)
    guard.begin(8, writes=True)
    assert guard.num_skipped == 2
    assert {line["step"] for line in lines_of(file)} == {2, 7}
    with pytest.raises(NotFiniteError, match=r"step 8: .* \(gradient; samples b\); 3 steps were skipped"):
        guard.skip([{"step": 8, "where": "gradient", "samples": ["b"]}], num_steps=100, writes=True)
    assert [line["step"] for line in lines_of(file)] == [2, 2, 7, 7, 8]


def test_a_run_without_a_single_good_step_is_not_done(tmp_path: Path) -> None:
    guard = FiniteGuard(tmp_path / NOT_FINITE_FILE, max_skipped=10)
    line = {"step": 0, "where": "loss", "samples": ["a"]}
    guard.skip([line], num_steps=2, writes=False)
    with pytest.raises(NotFiniteError):
        guard.skip([line], num_steps=2, writes=False)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 3.4e38, -7.25])
def test_a_finite_loss_keeps_its_bits(value: float, tmp_path: Path) -> None:
    guard = FiniteGuard(tmp_path / NOT_FINITE_FILE, max_skipped=0)
    weight = torch.tensor(value, requires_grad=True)
    loss = guard.checked(weight * 1.0, None)  # type: ignore[arg-type]
    loss.backward()
    assert loss.item().hex() == torch.tensor(value).item().hex()
    assert weight.grad == 1.0
