"""A disk that is full when a checkpoint is saved, or would become so: real refusals of the system, to real writers.

`test_commit.py` refuses every single call; here weights, optimizer and state are written by safetensors and torch,
which report a full disk in words of their own.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from evs_train.commit import Checkpoints
from evs_train.disk import full_disk_named
from evs_train.errors import StorageError
from evs_train.memory import checkpoint_bytes
from evs_train.trainer import UptrainTrainer
from evs_train.uptrain import Run
from launch import uptrain
from tests.runs import arguments, recipe_of

BLOCK = 4096


class Attempts(TrainerCallback):
    """Before the second step is saved, saves it on disks that refuse, and collects what is said."""

    def __init__(self, disks: list[contextlib.AbstractContextManager[None]]) -> None:
        self.disks = disks
        self.trainer: UptrainTrainer
        self.messages: list[str] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for disk in self.disks if state.global_step == 2 else ():
            self.messages.append(self._refusal(disk, model))
            gc.collect()  # a writer of torch that failed keeps its file, and its room, until it is collected
            output = Path(args.output_dir)
            assert Checkpoints(output).newest_whole().path == output / "checkpoint-1"
            assert not list(output.glob(".staging*"))

    def _refusal(self, disk: contextlib.AbstractContextManager[None], model: Any) -> str:
        with disk, pytest.raises(StorageError) as refused:
            self.trainer._save_checkpoint(model, None)
        return refused.value.message


@pytest.fixture
def words_of(tiny_checkpoint: Callable[[str], Path], world: Path, tmp_path: Path) -> Callable[..., list[str]]:
    def words(output: Path | None = None, **options: Any) -> list[str]:
        settings = {"train__steps": 2, "train__batch_size": 1, "train__save_every": 1, **options}
        return arguments(tiny_checkpoint("qwen3_vl"), world, output or tmp_path / "run", **settings)

    return words


@pytest.fixture
def run_of(words_of: Callable[..., list[str]]) -> Callable[..., Run]:
    def make(output: Path | None = None, **options: Any) -> Run:
        return Run(recipe_of(words_of(output, **options)))

    return make


def attempt(run: Run, disks: list[contextlib.AbstractContextManager[None]]) -> list[str]:
    """What was said on each disk. Then the run goes on, and saves."""
    attempts, build = Attempts(disks), run.build_trainer

    def build_trainer(args: Any = None) -> UptrainTrainer:
        attempts.trainer = build(args)
        attempts.trainer.add_callback(attempts)
        return attempts.trainer

    run.build_trainer = build_trainer  # type: ignore[method-assign]
    run.train()
    output = Path(run.recipe.output_dir)
    assert Checkpoints(output).newest_whole().path == output / "checkpoint-2"
    assert len(attempts.messages) == len(disks)
    return attempts.messages


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """The system refuses files that are larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_writers_in_other_languages_are_understood(run_of: Callable[..., Run]) -> None:
    """Neither safetensors nor torch raises an OSError."""
    weights, optimizer, state = attempt(run_of(), [largest_file(n) for n in (1 << 20, 5 << 20, 1 << 10)])
    assert "SafetensorError" in weights or "File too large" in weights
    assert "inline_container" in optimizer or "iostream" in optimizer
    for message in (weights, optimizer, state):
        assert "/run/.staging-checkpoint-2-" in message
        assert "bytes free" in message


@contextlib.contextmanager
def room(folder: Path, num_bytes: int) -> Iterator[None]:
    """All but so many bytes of the file system are taken."""
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        for _ in range((shutil.disk_usage(folder).free - num_bytes) // BLOCK):
            file.write(bytes(BLOCK))
    try:
        yield
    finally:
        ballast.unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", folder], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no right to mount a file system: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_full_at_any_byte(run_of: Callable[..., Run], small_disk: Path) -> None:
    """From nothing free to all but the last block of a checkpoint: weights, optimizer, state, manifest."""
    run = run_of(small_disk / "run")
    _, whole = checkpoint_bytes(run.load_model(), deepspeed=False)
    coarse = [whole * tenth // 10 for tenth in range(10)]
    fine = [whole + BLOCK * blocks for blocks in range(-2, 8)]
    messages = attempt(run, [room(small_disk, num_bytes) for num_bytes in (*coarse, *fine)])
    assert all(f"{small_disk}/run/.staging-checkpoint-2-" in message for message in messages)
    assert len({message.split(": ", 1)[1].split("/")[0] for message in messages}) >= 3, messages


@pytest.mark.parametrize("what", ["checkpoint", "record"])
def test_the_run_leaves_with_a_code_of_its_own(
    what: str, words_of: Callable[..., list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not with 2: nothing in the recipe is wrong. And not with 1 where it is not a checkpoint that finds no room."""
    output = tmp_path / "run"
    words = words_of(train__steps=1)
    if what == "record":
        output.mkdir()
        (output / "record.json.draft").symlink_to("/dev/full")
        code = uptrain.main(words)
    else:
        with largest_file(1 << 20):
            code = uptrain.main(words)
    said = capfd.readouterr().err
    assert code == StorageError.exit_code == 74, said
    assert "Traceback" not in said
    where = f" bytes free in {output}: [Errno {errno.ENOSPC}]" if what == "record" else ".staging-checkpoint-1-"
    assert where in said.split("error: ", 1)[1]


def test_only_a_lack_of_room_is_named_so(small_disk: Path) -> None:
    """In the system's words, and in safetensors'."""
    with pytest.raises(FileNotFoundError), full_disk_named(small_disk / "run"):
        (small_disk / "none" / "file").write_text("")
    large = {"weight": torch.zeros(21 << 20)}
    for write in (lambda: save_file(large, small_disk / "a"), lambda: (small_disk / "b").write_bytes(bytes(84 << 20))):
        with pytest.raises(StorageError, match="bytes free in"), full_disk_named(small_disk / "run" / "export"):
            write()
        for file in small_disk.iterdir():
            file.unlink()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_estimate_is_what_a_checkpoint_takes(method: str, run_of: Callable[..., Run], tmp_path: Path) -> None:
    run = run_of(tuning__method=method, train__steps=1)
    run.train()
    folder = tmp_path / "run" / "checkpoint-1"
    large = [file.stat().st_size for file in folder.iterdir() if file.stat().st_size > 100_000]
    weights, whole = checkpoint_bytes(run.load_model(), deepspeed=False)
    assert sum(large) == pytest.approx(whole, rel=0.06)
    assert min(large) == pytest.approx(weights, rel=0.06)


@pytest.mark.parametrize(("options", "count"), [({}, 2), ({"train__steps": 9}, 3), ({"train__save_every": None}, 0)])
def test_too_little_room_is_told_before_training(
    options: dict[str, Any], count: int, run_of: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(**options)
    weights, whole = checkpoint_bytes(run.load_model(), deepspeed=False)
    needed = max(count * whole, weights)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, needed - 1))  # type: ignore[attr-defined]
    with pytest.raises(StorageError) as refused:
        run.train()
    for part in (str(tmp_path / "run"), str(needed), str(needed - 1)):
        assert part in refused.value.message
    assert not (tmp_path / "run" / "record.json").exists()
