"""Runs of tiny recipes for tests: in this process, or as real processes through torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evs_train.config import Recipe
from evs_train.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]


def arguments(checkpoint: Path, rows: Path, output: Path, **overrides: Any) -> list[str]:
    """Arguments of a short float32 run of recipe=tiny on any family's checkpoint; `__` in a keyword is a dot."""
    settings = {
        "model.path": checkpoint,
        "model.dtype": "float32",
        "demo": None,
        "data.rows": rows,
        "data.num_workers": 0,
        "data.num_frames": 8,
        "data.fps": None,
        "output_dir": output,
        "tracking.wandb": False,
        "train.log_every": 1,
        "train.pictures_every": None,
        "export.enabled": False,
    } | {key.replace("__", "."): value for key, value in overrides.items()}
    return ["recipe=tiny", *(f"{key}={_yaml(value)}" for key, value in settings.items())]


def recipe_of(words: list[str]) -> Recipe:
    return load_recipe(words)


def torchrun(
    words: list[str], num_processes: int, timeout: int = 300, program: Sequence[str] = ("launch/uptrain.py",)
) -> subprocess.CompletedProcess[str]:
    """Run `program` (a script, or -m and a module) in real processes (gloo on CPU); all are ended when time is up."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    process = subprocess.Popen(
        [*command, *program, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        raise AssertionError(f"not done after {timeout} s; stderr ends with:\n{stderr[-4000:]}") from None
    return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)


class Ranks:
    """Real processes (torchrun, gloo on CPU) that do runs as they are asked for; started once for all (`runs_worker`).

    A run that fails ends them; the next one starts others.
    """

    def __init__(self, num_processes: int, folder: Path) -> None:
        self.num_processes, self.folder = num_processes, folder
        self.num_starts = self.num_jobs = 0
        self.process: subprocess.Popen[bytes] | None = None

    def train(self, *jobs: list[str], timeout: float = 300) -> None:
        """Do the runs with these arguments, one after the other. Fails with what the processes said if one fails."""
        if self.process is None:
            self._start()
        assert self.process is not None
        home, number = self.folder / str(self.num_starts), self.num_jobs
        self.num_jobs += 1
        (home / "partial").write_text(json.dumps(jobs), encoding="utf-8")
        (home / "partial").rename(home / f"job{number}")
        until = time.monotonic() + timeout
        while not all((home / f"job{number}.rank{rank}").exists() for rank in range(self.num_processes)):
            if self.process.poll() is not None or time.monotonic() > until:
                self.stop(kill=True)
                raise AssertionError((home / "log").read_text(errors="replace")[-6000:])
            time.sleep(0.02)

    def _start(self) -> None:
        self.num_starts, self.num_jobs = self.num_starts + 1, 0
        home = self.folder / str(self.num_starts)
        home.mkdir(parents=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={self.num_processes}", "-m", "tests.distributed.runs_worker", str(home)]
        with (home / "log").open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def stop(self, *, kill: bool = False) -> None:
        """End the processes, if there are any."""
        if self.process is None:
            return
        (self.folder / str(self.num_starts) / "end").touch()
        try:
            self.process.wait(0 if kill else 60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process = None


def metrics(output: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl that report a loss."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


STILL: dict[str, Any] = {"optim__lr": 1e-12, "optim__lr_by_part": {}, "optim__scheduler": "constant"}
"""Overrides of a run whose weights stand still, so that no step's rounding is carried into the next one."""


def assert_only_rounding(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    """Steps of two runs with `STILL` weights differ in the last digits of float32, and not to one side.

    Measured: single steps by up to 1.5e-7, their mean by 3e-8.
    """
    assert len(one) == len(other) >= 8
    for name in ("loss", "grad_norm"):
        residuals = [b[name] / a[name] - 1 for a, b in zip(one, other, strict=True)]
        assert max(map(abs, residuals)) < 5e-7, (name, residuals)
        assert abs(sum(residuals) / len(residuals)) < 1e-7, (name, residuals)


def _yaml(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool | dict | list) else str(value)
