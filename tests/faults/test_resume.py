"""A resumed run is the run that was never stopped: rows, rates, losses, counts and final weights, to the last bit.

Every run here is stopped by copying its folder without what came after a checkpoint, which is what a kill leaves. Rows
and rates are seen where the trainer is handed its batches (`tests/distributed/order_worker.py`). That each guard is
needed is tested by taking it away.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import Trainer

from evs_train import trainer as trainer_module
from evs_train import uptrain as uptrain_module
from evs_train.checkpoint import read_record
from evs_train.errors import RecipeError
from evs_train.restore import SinceLog, seed_anew
from evs_train.resume import refuse_differences
from evs_train.trainer import UptrainTrainer
from evs_train.uptrain import Run
from tests.distributed.order_worker import seen_in, stopped, watch
from tests.runs import arguments, assert_only_rounding, metrics, recipe_of, torchrun

STEPS = 6
EPOCH = 2
"""Steps of an epoch: of eight rows, four of which are a step's."""
MIDDLE = 3
"""A step within an epoch, within an interval of logs."""
UNIFORM = {"kind": "uniform", "min": 0.0, "max": 0.9}
LORA = {"tuning__method": "lora", "tuning__lora__r": 4, "tuning__lora__dropout": 0.3, "optim__lr": 1e-2}
STILL = {"optim__lr": 1e-12, "optim__scheduler": "constant"}
# How fast a run was, and what a shared cache already held, is not the run.
APART = ("time", "speed/", "memory/", "data/feature_cache")

Words = Callable[..., list[str]]


@pytest.fixture(scope="module")
def dropout_checkpoint(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose attention drops."""
    folder = tmp_path_factory.mktemp("dropout") / "model"
    shutil.copytree(tiny_checkpoint("qwen3_vl"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.2
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def rows(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight rows of videos, images and text, of which one video is torn."""
    folder = tmp_path_factory.mktemp("rows")
    found = [json.loads(line) for line in world.read_text(encoding="utf-8").splitlines()]
    videos = [row for row in found if "video" in row][:5]
    others = [
        next(row for row in found if "image" in row),
        *[r for r in found if not {"image", "video"} & r.keys()][:2],
    ]
    shutil.copytree(world.parent, folder / "world")
    (folder / "world" / "torn.mp4").write_bytes((world.parent / videos[0]["video"]).read_bytes()[:1500])
    videos[0] |= {"id": "torn", "video": "torn.mp4"}
    file = folder / "world" / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in videos + others), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def words_of(dropout_checkpoint: Path, rows: Path) -> Words:
    """Arguments of a run with dropout, whose logs span checkpoints."""

    def words(output: Path, **options: Any) -> list[str]:
        settings: dict[str, Any] = {
            "evs__rate": UNIFORM,
            "evs__scope": "sample",
            "train__batch_size": 2,
            "train__grad_accumulation": 2,
            "train__steps": STEPS,
            "train__log_every": 2,
            "train__save_every": 1,
            "train__keep_checkpoints": 9,
            **options,
        }
        return arguments(settings.pop("checkpoint", dropout_checkpoint), rows, output, **settings)

    return words


def weights(output: Path) -> str:
    """Hash of the final weights."""
    files = sorted((output / "final").glob("*.safetensors"))
    assert files
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def curve(output: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith(APART)} for line in metrics(output)]


def quarantined(output: Path) -> list[str]:
    file = output / "quarantine.jsonl"
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def assert_same_run(whole: Path, resumed: Path) -> None:
    assert curve(resumed) == curve(whole)
    assert quarantined(resumed) == quarantined(whole)
    assert weights(resumed) == weights(whole)


def assert_same_rows(whole: Path, resumed: Path, step: int) -> None:
    """Of folders that were `seen`."""
    expected = [line for line in seen_in(whole) if line["step"] >= step]
    assert expected
    assert seen_in(resumed) == expected


@pytest.fixture(scope="module")
def whole(words_of: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with LoRA, two kinds of dropout and a bad row, that was never stopped; what it saw is in `seen`."""
    folder = tmp_path_factory.mktemp("whole")
    watch(words_of(folder / "run", **LORA), folder / "seen")
    assert {"torn.mp4" in line for line in quarantined(folder / "run")} == {True}
    assert [line["step"] for line in metrics(folder / "run")] == [1, 2, 4, 6]
    return folder


@pytest.mark.parametrize(("step", "workers"), [(EPOCH, 0), (MIDDLE, 2)], ids=["end of an epoch", "middle, 2 workers"])
def test_with_dropout_and_a_bad_row(step: int, workers: int, whole: Path, words_of: Words, tmp_path: Path) -> None:
    output = stopped(whole / "run", step, tmp_path / "run")
    watch(words_of(output, **LORA, train__resume=True, data__num_workers=workers), tmp_path / "seen")
    assert_same_run(whole / "run", output)
    assert_same_rows(whole / "seen", tmp_path / "seen", step)
    (resumption,) = read_record(output)["resumed"]
    assert resumption == {"from": f"checkpoint-{step}", "processes": 1, "allowed": {}, "versions": {}}


TEACHER = {
    "objective": {"kind": "teacher"},
    "data__max_tokens_per_batch": 150,
    "train__batch_size": 1,
    "train__grad_accumulation": 1,
}
SANDWICH = {"objective": {"kind": "sandwich"}, "tuning__freeze": ["vision"], "optim__lr_by_part": {}}


@pytest.mark.parametrize("options", [TEACHER, SANDWICH], ids=["teacher, token budget", "sandwich, kept features"])
def test_objectives_budgets_and_kept_features(options: dict[str, Any], words_of: Words, tmp_path: Path) -> None:
    options = {**options, "train__steps": 4, "data__index": tmp_path / "media.arrow"}
    if options["objective"]["kind"] == "sandwich":
        options["data__cache_features"] = {"path": str(tmp_path / "cache"), "max_gib": 1}
    Run(recipe_of(words_of(tmp_path / "whole", **options))).train()
    output = stopped(tmp_path / "whole", MIDDLE, tmp_path / "resumed")
    Run(recipe_of(words_of(output, **options, train__resume=True))).train()
    assert_same_run(tmp_path / "whole", output)


def test_two_processes_and_another_number_of_them(
    words_of: Words, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Two go on as if never stopped. Two that go on where one was, and one where they were, see the same rows."""
    half = {"train__batch_size": 1, "data__num_workers": 2, "train__save_every": MIDDLE}
    plain = {"checkpoint": tiny_checkpoint("qwen3_vl"), "train__log_every": 1, "train__steps": 8, **STILL}
    one = tmp_path / "one"
    watch(words_of(one, **plain, train__save_every=MIDDLE), tmp_path / "seen_one")
    jobs: list[dict[str, Any]] = []

    def job(output: Path, seen: str, after: Path | None = None, **options: Any) -> None:
        resume = {"train__resume": True} if after is not None else {}
        words = words_of(output, **options, **half, **resume)
        goes_on = {} if after is None else {"stopped": [str(after), MIDDLE]}
        jobs.append({"words": words, "seen": str(tmp_path / seen), "killed_at": None, **goes_on})

    job(tmp_path / "whole", "seen_whole", **LORA)
    job(tmp_path / "resumed", "seen_resumed", tmp_path / "whole", **LORA)
    job(tmp_path / "two", "seen_two", one, **plain)
    file = tmp_path / "jobs.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    done = torchrun([str(file)], 2, program=("-m", "tests.distributed.order_worker"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    assert_same_rows(tmp_path / "seen_whole", tmp_path / "seen_resumed", MIDDLE)

    back = stopped(tmp_path / "two", 2 * MIDDLE, tmp_path / "back")
    watch(words_of(back, **plain, train__resume=True), tmp_path / "seen_back")
    assert_same_rows(tmp_path / "seen_one", tmp_path / "seen_two", MIDDLE)
    assert_same_rows(tmp_path / "seen_one", tmp_path / "seen_back", 2 * MIDDLE)
    for other in (tmp_path / "two", back):
        assert_only_rounding(metrics(one), metrics(other))
    assert [one["processes"] for one in read_record(back)["resumed"]] == [2, 1]


def test_random_numbers_start_anew_for_another_number_of_processes(
    whole: Path, words_of: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not from the run's beginning, nor alike on all ranks, as transformers has it: it leaves them as they are."""
    output = stopped(whole / "run", STEPS - 1, tmp_path / "run")
    monkeypatch.setattr(trainer_module, "num_generators", lambda checkpoint: 2)
    places: list[tuple[int, int, int]] = []
    monkeypatch.setattr(trainer_module, "seed_anew", lambda *place: places.append(place) or seed_anew(*place))  # type: ignore[func-returns-value]
    watch(words_of(output, **LORA, train__resume=True), tmp_path / "seen")
    assert places == [(0, STEPS - 1, 0)]
    assert_same_rows(whole / "seen", tmp_path / "seen", STEPS - 1)
    assert weights(output) != weights(whole / "run")


def _nothing_removed(monkeypatch: pytest.MonkeyPatch) -> None: ...


def _no_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UptrainTrainer, "_init_training_state", Trainer._init_training_state)


def _no_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "set_options", lambda *given: None)


@pytest.mark.parametrize(
    ("remove", "differs"),
    [
        (_nothing_removed, set()),
        (_no_intervals, {"logs", "saves"}),
        (_no_options, {"rates", "betas", "decay"}),
    ],
    ids=["as it is", "without intervals", "without options"],
)
def test_intervals_and_allowed_options_are_the_recipes(
    remove: Callable[[pytest.MonkeyPatch], None],
    differs: set[str],
    whole: Path,
    words_of: Words,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """transformers goes on with the checkpoint's, whatever it is told."""
    output = stopped(whole / "run", MIDDLE, tmp_path / "run")
    changes: dict[str, Any] = {
        "train__log_every": 1,
        "train__save_every": 2,
        "optim__lr": 5e-3,
        "optim__weight_decay": 0.1,
        "optim__betas": [0.8, 0.9],
        "optim__scheduler": "constant",
    }
    allowed = ["optim.lr", "optim.weight_decay", "optim.betas", "optim.scheduler"]
    run = Run(recipe_of(words_of(output, **LORA | changes, train__resume=True, train__resume_allow=allowed)))
    trainers: list[UptrainTrainer] = []
    build = run.build_trainer
    run.build_trainer = lambda args=None: trainers.append(build(args)) or trainers[0]  # type: ignore[method-assign,func-returns-value]
    remove(monkeypatch)
    run.train()
    groups = trainers[0].optimizer.param_groups  # type: ignore[union-attr]
    found = {
        "logs": [line["step"] for line in metrics(output)],
        "saves": sorted(path.name for path in output.glob("checkpoint-*")),
        "rates": {line["lr/language_model"] for line in metrics(output)[2:]},
        "betas": {group["betas"] for group in groups},
        "decay": {(group["name"].endswith("no_decay"), group["weight_decay"]) for group in groups},
    }
    recipes = {
        "logs": [1, 2, 4, 5, 6],
        "saves": [f"checkpoint-{step}" for step in (1, 2, 3, 4, 6)],
        "rates": {5e-3},
        "betas": {(0.8, 0.9)},
        "decay": {(False, 0.1)},
    }
    assert {what for what in found if found[what] != recipes[what]} == differs, found
    (resumption,) = read_record(output)["resumed"]
    assert resumption["allowed"]["optim.lr"] == {"was": 1e-2, "now": 5e-3}
    assert sorted(resumption["allowed"]) == sorted(allowed)


def other_base(dropout_checkpoint: Path, to: Path) -> Path:
    """A copy of the base in which one tensor has other values: same names, shapes and sizes."""
    shutil.copytree(dropout_checkpoint, to)
    tensors = load_file(to / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name] = tensors[name] + 0.01
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def test_another_base_is_refused_or_recorded(
    whole: Path, words_of: Words, dropout_checkpoint: Path, tmp_path: Path
) -> None:
    """At another path the same base is the same; at the same path another one is not."""
    same = Path(shutil.copytree(dropout_checkpoint, tmp_path / "same"))
    other = other_base(dropout_checkpoint, tmp_path / "other")
    before = read_record(whole / "run")["base_files"]["model.safetensors"]
    output = stopped(whole / "run", STEPS - 1, tmp_path / "run")
    options = {**LORA, "train__resume": True}
    with pytest.raises(RecipeError, match=rf"base_files \(was .*{before}.*, is .*model\.safetensors") as caught:
        Run(recipe_of(words_of(output, checkpoint=other, **options))).train()
    assert "config.json" not in str(caught.value)
    assert "train.resume_allow='[base_files]'" in caught.value.hint
    Run(recipe_of(words_of(output, checkpoint=same, **options))).train()
    assert_same_run(whole / "run", output)
    shutil.rmtree(output / f"checkpoint-{STEPS}")
    Run(recipe_of(words_of(output, checkpoint=other, **options, train__resume_allow=["base_files"]))).train()
    first, second = read_record(output)["resumed"]
    assert first["allowed"] == {}
    assert second["allowed"]["base_files"]["was"] == {"model.safetensors": before}
    assert weights(output) != weights(whole / "run")


def test_zero_2_goes_on_with_as_many_processes_and_refuses_others(words_of: Words, tmp_path: Path) -> None:
    """DeepSpeed's own refusal (read: ZeRORuntimeException in `engine.py`) comes when the weights are loaded."""
    options = {"deepspeed": "zero2", "train__steps": 4, "train__batch_size": 1, "train__save_every": MIDDLE}
    options |= {"optim__scheduler": "constant", "optim__lr_by_part": {}}
    whole, resumed, faster = tmp_path / "whole", tmp_path / "resumed", tmp_path / "faster"
    more = {"optim__lr": 0.1, "train__resume_allow": ["optim.lr"]}
    goes_on = {"killed_at": None, "stopped": [str(whole), MIDDLE]}
    jobs = [
        {"words": words_of(whole, **options), "seen": str(tmp_path / "seen_whole"), "killed_at": None},
        {
            "words": words_of(resumed, **options, train__resume=True),
            "seen": str(tmp_path / "seen_resumed"),
            **goes_on,
        },
        {
            "words": words_of(faster, **options | more, train__resume=True),
            "seen": str(tmp_path / "seen_faster"),
            **goes_on,
        },
    ]
    file = tmp_path / "jobs.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    done = torchrun([str(file)], 2, program=("-m", "tests.distributed.order_worker"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_run(whole, resumed)
    assert_same_rows(tmp_path / "seen_whole", tmp_path / "seen_resumed", MIDDLE)
    assert metrics(faster)[-1]["lr/language_model"] == 0.1
    moved = [_distance(whole / f"checkpoint-{MIDDLE}", output / "final") for output in (resumed, faster)]
    assert moved[1] > 10 * moved[0]
    before = read_record(resumed)
    alone = Run(recipe_of(words_of(resumed, **options | {"train__batch_size": 2})))
    with pytest.raises(RecipeError, match=r"zero_shards \(was 2, is 1\)") as caught:
        refuse_differences(before, alone._record(), str(resumed))
    assert "start as many as before" in caught.value.hint
    plain = Run(recipe_of(words_of(resumed, **options | {"train__batch_size": 2, "deepspeed": None})))
    with pytest.raises(RecipeError, match=r"zero_stage \(was 2, is None\)"):
        refuse_differences(before, plain._record(), str(resumed))


def _distance(one: Path, other: Path) -> float:
    """Largest difference of two folders' weights."""
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return max((a[name] - b[name]).abs().max().item() for name in a)


def _no_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_load_rng_state", lambda self, checkpoint: None)


def _no_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    read = trainer_module.read_counts

    def nothing(*place: Any) -> SinceLog:
        return SinceLog(STEPS - 1, 0.0, 0.0, [0.0] * len(read(*place).sums))

    monkeypatch.setattr(trainer_module, "read_counts", nothing)


def _no_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UptrainTrainer, "_load_optimizer_and_scheduler", lambda self, checkpoint: None)


def _no_stand_ins_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module.Quarantine, "begin", lambda self, step, writes: None)


@pytest.mark.parametrize("remove", [_no_generators, _no_counts, _no_optimizer, _no_stand_ins_counted])
def test_each_part_of_the_restoration_is_needed(
    remove: Callable[[pytest.MonkeyPatch], None],
    whole: Path,
    words_of: Words,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = stopped(whole / "run", STEPS - 1, tmp_path / "run")  # within an interval of logs
    remove(monkeypatch)
    Run(recipe_of(words_of(output, **LORA, train__resume=True))).train()
    with pytest.raises(AssertionError):
        assert_same_run(whole / "run", output)


def test_without_fingerprints_another_base_goes_on_unseen(
    whole: Path,
    words_of: Words,
    dropout_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = stopped(whole / "run", STEPS - 1, tmp_path / "run")
    base = other_base(dropout_checkpoint, tmp_path / "other")
    expected = read_record(output)["base_files"]
    monkeypatch.setattr(uptrain_module, "fingerprints", lambda folder: expected)
    Run(recipe_of(words_of(output, checkpoint=base, **LORA, train__resume=True))).train()
    assert read_record(output)["resumed"][-1]["allowed"] == {}
    assert weights(output) != weights(whole / "run")
