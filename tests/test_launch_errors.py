"""What a person sees when a command meets a mistake of theirs: one error that names the place, a hint, exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from evs_train import cli
from launch import uptrain

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def arguments(tiny_checkpoint: Callable[[str], Path], world: Path, tmp_path: Path) -> list[str]:
    """A run that would work."""
    return [
        "recipe=tiny",
        "demo=null",
        f"model.path={tiny_checkpoint('qwen3_vl')}",
        f"data.rows={world}",
        f"output_dir={tmp_path / 'run'}",
        "data.num_workers=0",
        "train.steps=1",
        "train.batch_size=1",
        "train.pictures_every=null",
        "tracking.wandb=false",
    ]


@pytest.fixture
def failing(capfd: pytest.CaptureFixture[str]) -> Callable[[int], str]:
    """Checks an exit code and what was printed; gives the error with its hint."""

    def check(code: int) -> str:
        printed = capfd.readouterr()
        assert code == 2, printed.err
        return only_error(printed.err)

    return check


def only_error(stderr: str) -> str:
    assert "Traceback" not in stderr
    assert stderr.count("error: ") == 1, stderr
    return stderr[stderr.index("error: ") :].strip()


def rows_file(tmp_path: Path, **row: Any) -> Path:
    """A data file whose second row is bad."""
    talk = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hi."}]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"conversations": talk}, row]), encoding="utf-8")
    return file


def talk_about(question: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "That."}]


def test_unknown_key(failing: Callable[[int], str]) -> None:
    error = failing(uptrain.main(["recipe=tiny", "evs.rat=0.5", "tran.steps=1"]))
    assert "evs.rat: unknown key; did you mean evs.rate?" in error
    assert "tran: unknown key; did you mean train?" in error


def test_bad_rate(failing: Callable[[int], str]) -> None:
    error = failing(uptrain.main(["recipe=tiny", "evs.rate={kind: beta, mode: 0.9}"]))
    assert "evs.rate.mode must be below max" in error


def test_missing_recipe(failing: Callable[[int], str]) -> None:
    error = failing(uptrain.main(["recipe=tinny"]))
    assert error.startswith("error: there is no recipe 'tinny'\n  hint: did you mean tiny? ")
    assert failing(uptrain.main([])).startswith("error: no recipe is named\n  hint: add recipe=NAME")


def test_missing_rows_file(arguments: list[str], failing: Callable[[int], str]) -> None:
    error = failing(uptrain.main([*arguments, "data.rows=/no/such/rows.json"]))
    assert error.startswith("error: /no/such/rows.json: data file cannot be read")
    assert "\n  hint: " in error


def test_placeholder_without_a_video(arguments: list[str], tmp_path: Path, failing: Callable[[int], str]) -> None:
    file = rows_file(tmp_path, conversations=talk_about("<video>\nWhat?"))
    error = failing(uptrain.main([*arguments, f"data.rows={file}"]))
    assert error.startswith(f"error: {file} row 2: 1 <video> placeholder(s) in the text, but 0 file(s)")
    assert "\n  hint: " in error


def test_missing_media_file(arguments: list[str], tmp_path: Path, failing: Callable[[int], str]) -> None:
    file = rows_file(tmp_path, conversations=talk_about("<video>\nWhat?"), video="gone.mp4")
    error = failing(uptrain.main([*arguments, f"data.rows={file}"]))
    assert error.startswith(f"error: {file} row 2: video file not found: {tmp_path / 'gone.mp4'}\n  hint: ")


@pytest.mark.parametrize("mode", ["dry_run=true", "dry_run=false", "data.num_workers=1"])
def test_damaged_media_file(
    arguments: list[str], world: Path, tmp_path: Path, failing: Callable[[int], str], mode: str
) -> None:
    """Found when it is read: in a dry run, in the process that trains, or in a worker of its loader."""
    (tmp_path / "torn.mp4").write_bytes((world.parent / "clips" / "000000.mp4").read_bytes()[:1500])
    row = {"conversations": talk_about("<video>\nWhat?"), "video": "torn.mp4"}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row), encoding="utf-8")
    error = failing(uptrain.main([*arguments, f"data.rows={file}", "data.on_error=raise", mode]))
    assert str(tmp_path / "torn.mp4") in error
    assert "\n  hint: " in error


def test_unsupported_architecture(arguments: list[str], tmp_path: Path, failing: Callable[[int], str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    error = failing(uptrain.main([*arguments, f"model.path={tmp_path}"]))
    assert error.startswith(f"error: the architecture 'llama' of {tmp_path} is not supported\n  hint: supported: ")
    assert "qwen3_vl" in error


def test_a_name_that_is_no_folder(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, failing: Callable[[int], str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    error = failing(uptrain.main([*arguments, "model.path=modell"]))
    assert error.startswith("error: the checkpoint modell cannot be read: ")
    assert "\n  hint: no folder here is called modell, so the hub was asked for it: check model.path" in error


def test_missing_checkpoint(arguments: list[str], failing: Callable[[int], str]) -> None:
    error = failing(uptrain.main([*arguments, "model.path=/no/such/model"]))
    assert error.startswith("error: the checkpoint /no/such/model does not exist\n  hint: model.path is ")


def test_unknown_deepspeed_configuration(arguments: list[str], failing: Callable[[int], str]) -> None:
    error = failing(uptrain.main([*arguments, "deepspeed=zero9"]))
    assert error.startswith("error: deepspeed: there is no configuration 'zero9'\n  hint: shipped: ")
    assert "zero3" in error


@pytest.mark.parametrize("dry_run", ["true", "false"])
def test_bad_adapter_target(arguments: list[str], failing: Callable[[int], str], dry_run: str) -> None:
    tuning = ["tuning.method=lora", "tuning.lora.targets=[q_prj]"]
    error = failing(uptrain.main([*arguments, *tuning, f"dry_run={dry_run}"]))
    assert error.startswith("error: tuning.lora.targets: no linear layer of language_model is called q_prj\n  hint: ")


def test_other_ranks_fail_in_silence(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert uptrain.main([*arguments, "model.path=/no/such/model"]) == 2
    assert "error" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "error: no command\n  hint: commands: "),
        (["exprot"], "error: unknown command 'exprot'\n  hint: commands: "),
        (["export"], "error: run=... is missing\n  hint: keys: run, "),
        (["export", "rnu=x"], "error: unknown key 'rnu'\n  hint: did you mean run?"),
        (["export", "nowhere"], "error: 'nowhere' is not of the form key=value"),
        (["export", "run=nowhere"], "error: nowhere holds no run\n  hint: training writes record.json"),
        (["export", "run=nowhere", "rate=much"], "error: rate must be a number in [0, 1), got 'much'"),
    ],
)
def test_command_line(words: list[str], error: str, failing: Callable[[int], str]) -> None:
    found = failing(cli.main(words))
    assert found.startswith(error)
    if "commands: " in error:
        assert "export" in found.split("hint:")[1]


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([word]) == 0
    printed = capsys.readouterr().out
    assert all(f"evs-train {name} " in printed for name in cli.COMMANDS)
    assert cli.main(["export", word]) == 0
    (line, *_) = capsys.readouterr().out.splitlines()
    assert line.startswith("evs-train export run=FOLDER ")
    assert uptrain.main(["recipe=tiny", word]) == 0
    printed = capsys.readouterr().out
    assert "recipe=NAME" in printed
    assert "qwen3_vl_8b" in printed


@pytest.mark.parametrize(
    ("program", "error"),
    [
        (["launch/uptrain.py", "recipe=tiny", "demo=null", "data.rows=none.json"], "error: none.json: data file"),
        (["-m", "evs_train.cli", "exprot"], "error: unknown command 'exprot'"),
    ],
)
def test_as_a_process(program: list[str], error: str) -> None:
    done = subprocess.run([sys.executable, *program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert only_error(done.stderr).startswith(error)


def test_bad_deepspeed_file(arguments: list[str], tmp_path: Path, failing: Callable[[int], str]) -> None:
    file = tmp_path / "zero.json"
    file.write_text("{", encoding="utf-8")
    for mode in ("dry_run=true", "dry_run=false"):
        error = failing(uptrain.main([*arguments, f"deepspeed={file}", mode]))
        assert error.startswith(f"error: deepspeed: {file} is not valid JSON")
        assert "there is no configuration 'zero9'" in failing(uptrain.main([*arguments, "deepspeed=zero9", mode]))


def test_output_dir_that_cannot_be_made(arguments: list[str], tmp_path: Path, failing: Callable[[int], str]) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    error = failing(uptrain.main([*arguments, f"output_dir={tmp_path / 'file' / 'run'}"]))
    assert error.startswith(f"error: output_dir: {tmp_path / 'file' / 'run'} cannot be made")


def test_torn_record(tmp_path: Path, failing: Callable[[int], str]) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "record.json").write_text("{", encoding="utf-8")
    error = failing(cli.main(["export", f"run={tmp_path}"]))
    assert "record.json is not valid JSON" in error
