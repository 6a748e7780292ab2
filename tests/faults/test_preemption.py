"""Signals to one rank, to torchrun and to everybody: each time all ranks save the same step and leave with 75."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from evs_train import preemption
from evs_train.commit import Checkpoints
from evs_train.errors import EXIT_CODES, PreemptedError
from evs_train.preemption import Preemption
from evs_train.trainer import UptrainTrainer
from evs_train.uptrain import Run
from tests.runs import ROOT, arguments, metrics, recipe_of

MANY = 1000
"""Steps: more than a run gets through before the signal."""
TORCHRUN = "torch.distributed.run --standalone --nproc_per_node=2"
DONE = 3
"""The signal comes when so many steps are logged."""


def words_of(checkpoint: Path, rows: Path, output: Path, **options: Any) -> list[str]:
    settings: dict[str, Any] = {
        "train__steps": MANY,
        "train__batch_size": 1,
        "train__save_every": None,
        "data__num_workers": 2,
        "optim__scheduler": "constant",
        **options,
    }
    return arguments(checkpoint, rows, output, **settings)


class Training:
    """A training of two processes by torchrun, in a process group of its own, with threads of torch in all of them."""

    def __init__(self, words: list[str], output: Path) -> None:
        self.output = output
        self.log = output.with_suffix(".log")
        with self.log.open("w") as log:
            self.torchrun = subprocess.Popen(
                [sys.executable, "-m", *TORCHRUN.split(), "launch/uptrain.py", *words],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""},
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )

    def ranks(self) -> list[int]:
        return [child for child in children(self.torchrun.pid) if "launch/uptrain.py" in command_of(child)]

    def wait_until_it_trains(self) -> None:
        deadline = time.monotonic() + 300
        file = self.output / "metrics.jsonl"
        while not file.exists() or len(file.read_text().splitlines()) < DONE:
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            assert self.torchrun.poll() is None, self.log.read_text()[-4000:]
            time.sleep(0.05)

    def wait(self) -> str:
        """Until torchrun is gone; what was said."""
        self.torchrun.wait(300)
        return self.log.read_text()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


Start = Callable[..., Training]


@pytest.fixture
def start(tiny_checkpoint: Callable[[str], Path], mixed_rows: Path, tmp_path: Path) -> Iterator[Start]:
    started: list[Training] = []

    def starting(**options: Any) -> Training:
        output = tmp_path / "run"
        started.append(Training(words_of(tiny_checkpoint("qwen3_vl"), mixed_rows, output, **options), output))
        started[-1].wait_until_it_trains()
        return started[-1]

    yield starting
    for training in started:
        if training.torchrun.poll() is None:
            os.killpg(training.torchrun.pid, signal.SIGKILL)
            training.torchrun.wait()


def saved_step(output: Path) -> int:
    """Of the only checkpoint, behind the last step that is logged."""
    (checkpoint,) = output.glob("checkpoint-*")
    step = int(checkpoint.name.rsplit("-", 1)[1])
    assert metrics(output)[-1]["step"] == step >= DONE
    assert not (output / "final").exists()
    return step


def check_said(said: str, step: int) -> None:
    assert said.count(f"error: told to end by a signal; step {step} is saved in ") == 1, said[-4000:]
    assert "Traceback" not in said.split("torch/distributed/", maxsplit=1)[0], said[-4000:]
    for noise in ("DataLoader worker", "terminate called", "resource_tracker", "quarantine"):
        assert noise not in said, said[-4000:]


def test_one_rank_is_told_and_all_save(start: Start) -> None:
    training = start()
    os.kill(training.ranks()[1], signal.SIGUSR1)
    said = training.wait()
    check_said(said, saved_step(training.output))
    codes = re.findall(r"exitcode\s*: (-?\d+)", said)
    assert codes
    assert set(codes) == {"75"}, said[-4000:]
    assert training.torchrun.returncode == 1


def test_everybody_is_told_at_once(start: Start) -> None:
    """Ranks, their loaders and decoders, and torchrun, which tells its ranks again."""
    training = start()
    loaders = [child for rank in training.ranks() for child in children(rank)]
    assert len(loaders) >= 4
    os.killpg(training.torchrun.pid, signal.SIGTERM)
    said = training.wait()
    check_said(said, saved_step(training.output))
    assert "Received 15 death signal" in said or "Received Signals.SIGTERM death signal" in said
    assert training.torchrun.returncode == 1
    assert not [pid for pid in loaders if Path(f"/proc/{pid}").exists()]


class Told(TrainerCallback):
    """Signals this process after a step, as a scheduler would."""

    def __init__(self, trainer: UptrainTrainer, step: int) -> None:
        self.trainer, self.step = trainer, step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
            until(lambda: self.trainer.preemption.requested)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class ToldRun(Run):
    told_at: int

    def build_trainer(self, args: TrainingArguments | None = None) -> UptrainTrainer:
        trainer = super().build_trainer(args)
        trainer.add_callback(Told(trainer, self.told_at))
        return trainer


@pytest.mark.parametrize("save_every", [None, 3])
def test_a_run_that_was_told_to_end_goes_on_as_if_it_had_not_been(
    save_every: int | None,
    tiny_checkpoint: Callable[[str], Path],
    mixed_rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the last bit; and what is saved already is not saved again."""

    def words(name: str, **options: Any) -> list[str]:
        few = {"train__steps": 5, "data__num_workers": 0, "train__save_every": save_every, **options}
        return words_of(tiny_checkpoint("qwen3_vl"), mixed_rows, tmp_path / name, **few)

    saves: list[str] = []
    save = Checkpoints.save

    def counted(self: Checkpoints, name: str, *rest: Any) -> None:
        saves.append(name)
        save(self, name, *rest)

    Run(recipe_of(words("whole"))).train()
    monkeypatch.setattr(Checkpoints, "save", counted)
    told = ToldRun(recipe_of(words("told")))
    told.told_at = 3
    handlers = [signal.getsignal(number) for number in preemption.SIGNALS]
    with pytest.raises(PreemptedError, match="step 3 is saved"):
        told.train()
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == handlers
    assert "preemption" not in [thread.name for thread in threading.enumerate()]
    assert [path.name for path in (tmp_path / "told").glob("checkpoint-*")] == saves == ["checkpoint-3"]
    Run(recipe_of(words("told", train__resume=True))).train()
    expected, found = metrics(tmp_path / "whole"), metrics(tmp_path / "told")
    assert len(found) == len(expected) == 5
    assert [line["loss"] for line in found] == [line["loss"] for line in expected]
    assert (tmp_path / "told/final/model.safetensors").read_bytes() == (
        tmp_path / "whole/final/model.safetensors"
    ).read_bytes()


def test_before_the_first_step_nothing_is_saved(
    tiny_checkpoint: Callable[[str], Path], mixed_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter = Preemption.__enter__

    def told(self: Preemption) -> Preemption:
        enter(self)
        os.kill(os.getpid(), signal.SIGUSR1)
        until(lambda: self.requested)
        return self

    monkeypatch.setattr(Preemption, "__enter__", told)
    run = Run(recipe_of(words_of(tiny_checkpoint("qwen3_vl"), mixed_rows, tmp_path / "run", data__num_workers=0)))
    with pytest.raises(PreemptedError, match="no step was done yet"):
        run.train()
    assert not list((tmp_path / "run").glob("checkpoint-*"))


ALONE = """
import ctypes, os, signal, sys, threading, time
from evs_train import preemption
preemption.SAME_SECONDS = float(sys.argv[1])
with preemption.Preemption() as told:
    print("ready", flush=True)
    while not told.requested:
        time.sleep(0.01)
    print("told", flush=True)
    if sys.argv[2] == "without the pipe":
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(143))
        print("deaf", flush=True)
    if sys.argv[2] != "free":  # in a call that no signal ends, as in a collective
        mutex = ctypes.create_string_buffer(64)
        libc = ctypes.CDLL(None)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)
    time.sleep(0.5)
print("left", flush=True)
time.sleep(10)
"""


@pytest.mark.parametrize(
    ("same_seconds", "state", "code"),
    [(0.0, "stuck", 143), (60.0, "free", -signal.SIGTERM)],
    ids=["a second signal ends it at once", "the same request twice does not, and later signals end it as ever"],
)
def test_the_second_signal(same_seconds: float, state: str, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ALONE, str(same_seconds), state], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "told\n"
    process.send_signal(signal.SIGTERM)
    if state == "free":
        assert process.stdout.readline() == "left\n"
        process.send_signal(signal.SIGTERM)
    assert process.wait(30) == code
    assert code < 0 or code in EXIT_CODES


def test_a_handler_of_pythons_own_would_not_end_it() -> None:
    """Why the number of a signal goes through a pipe: where "stuck" ends, this one stays."""
    words = [sys.executable, "-c", ALONE, "0", "without the pipe"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    assert [process.stdout.readline() for _ in range(2)] == ["told\n", "deaf\n"]
    until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_SLEEPING)  # in the call
    process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.kill()
    process.wait()


LOADER = """
import signal, subprocess, sys
import torch
from torch.utils.data import DataLoader
from evs_train import preemption
guarded = sys.argv[1]
torch.set_num_threads(2)  # as where OMP_NUM_THREADS is not set: torch starts one in each loader, before init_fn
loader = DataLoader(range(100), num_workers=1)
if guarded != "not":
    preemption.outlive_signals(loader)
if guarded == "too late":
    loader.multiprocessing_context, init = "fork", loader.worker_init_fn
    def block(worker):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        init(worker)
    loader.worker_init_fn = block
rows = iter(loader)
next(rows)
worker, = rows._workers
for name in [*["TERM"] * 100, "USR1"]:  # any thread may get it
    subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)  # from another process than its parent
assert len(list(rows)) == 99
worker.terminate()
worker.join(30)
assert worker.exitcode == 0, worker.exitcode
assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, set())  # here it is not blocked any more
"""


@pytest.mark.parametrize("guarded", ["not", "too late", "whole"])
def test_a_loader_outlives_signals_to_the_group_and_obeys_its_parent(guarded: str) -> None:
    """torch's own handler ends a loader's process by SIGTERM, in whichever thread, and the run with it."""
    words = [sys.executable, "-c", LOADER, guarded]
    done = subprocess.run(words, check=False, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    if guarded == "whole":
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0
        assert re.search("killed by signal: Terminated|ConnectionResetError", done.stderr), done.stderr
