"""What two processes do in test_pairs.py, with a guard or without it. Each says in NOTES/RANK what came of it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import distributed

from evs_train import processes, uptrain
from evs_train.commit import Checkpoints, Ranks
from evs_train.errors import EvsTrainError, PreemptedError
from launch import uptrain as entry
from tests.distributed.order_worker import watch

BUDGET, FURTHER = 300, 20
"""Tokens of a micro-batch, and how many more the second process plans with."""
LATE_SECONDS = 1.0


def share(rank: int, notes: str, looks: bool) -> None:
    """Save a checkpoint together, each process on a disk of its own. `looks`: for the first one's file, as it is."""
    processes.SEEN_WITHIN_SECONDS = 0.5
    if not looks:
        processes._seen = lambda file: True
    output = Path(notes) / f"disk{rank}" / "run"

    def gather(items: list[Any]) -> list[Any]:
        given: list[list[Any]] = [[], []]
        distributed.all_gather_object(given, items)
        return given[0] + given[1]

    def write(staging: Path) -> None:
        (staging / "checkpoint-1").mkdir(parents=True)
        (staging / "checkpoint-1" / f"shard_{rank}.pt").write_bytes(b"shard")

    processes.connect_on_cpu(minutes=1.0)
    try:
        processes.share_folder(output)
        Checkpoints(output, Ranks(rank, 2, gather)).save("checkpoint-1", 1, write)
        said = f"saved; {Checkpoints(output).fault_of('checkpoint-1')}"
    except EvsTrainError as error:
        said = error.message
    say(notes, rank, said)
    distributed.barrier()


def plan(rank: int, notes: str, words: list[str], agrees: bool) -> None:
    """Train by plans that differ; what is read goes to NOTES/seen. `agrees`: or finds out, as it is."""
    if not agrees:
        uptrain.agree_on = lambda plan: None
    budget = f"data.max_tokens_per_batch={BUDGET + FURTHER * rank}"
    said = "trained"
    try:
        watch([*words, budget], Path(notes) / "seen")
    except EvsTrainError as error:
        said = error.message
    say(notes, rank, said)
    distributed.barrier()


def end(rank: int, notes: str, words: list[str], without: str | None) -> None:
    """Be told to end, and leave. When the second process is gone, the first one gets SIGTERM, as by torchrun.

    The first one is late: on its way out of the training where the second does not wait for it, and behind that else.

    Args:
        without: `ignoring` SIGTERM, or `waiting` for the other.
    """
    gone = Path(notes) / "gone"

    def told(run: uptrain.Run, report: Any) -> None:
        run._connected()
        if rank == 0:
            until_there(gone, LATE_SECONDS)
        raise PreemptedError("told to end")

    leave = uptrain.leave_process_group
    uptrain.Run.train = told  # type: ignore[method-assign,assignment]
    if without == "ignoring":
        entry.signal = SimpleNamespace(SIGTERM=0, SIG_IGN=0, signal=lambda *given: None)  # type: ignore[assignment]
    elif without == "waiting":
        uptrain.leave_process_group = lambda **given: leave()
    say(notes, f"pid{rank}", str(os.getpid()))
    code = entry.main(words)
    if rank == 1:
        say(notes, rank, str(code))
        os.kill(int((Path(notes) / "pid0").read_text()), signal.SIGTERM)
        gone.touch()
    else:
        until_there(gone, 60)
        say(notes, rank, str(code))


def until_there(file: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def say(notes: str, name: int | str, what: str) -> None:
    (Path(notes) / str(name)).write_text(what, encoding="utf-8")
