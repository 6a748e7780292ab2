"""What a resumed run needs beside weights and optimizer: random numbers, what was counted since the last log, and the
recipe's own optimizer options.

transformers keeps a state of the random numbers for each rank. Here each rank adds what it counted since the last log,
so that a log which spans the checkpoint says what it would have said.

Invariant: with as many processes as before, nothing of these differs from a run that was never stopped. With another
number, counts keep their sums, and random numbers start anew from (seed, step, rank), since the old streams belong to
ranks that are gone. Cost: one small file per rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch.optim.lr_scheduler import LambdaLR
from transformers import set_seed


@dataclass(frozen=True)
class SinceLog:
    """What one rank counted since the last log, at a checkpoint.

    Attributes:
        last_log: step of that log.
        loss: sum of the steps' losses, as the Trainer adds them up.
        seconds: since that log.
        sums: of `Tally`.
    """

    last_log: int
    loss: float
    seconds: float
    sums: list[float] = field(default_factory=list)


def write_counts(checkpoint: Path, rank: int, counts: SinceLog) -> None:
    """Write one rank's counts into a checkpoint's folder."""
    (checkpoint / f"since_log_{rank}.json").write_text(json.dumps(asdict(counts)) + "\n", encoding="utf-8")


def read_counts(checkpoint: Path, rank: int, num_ranks: int) -> SinceLog:
    """The counts with which `rank` of `num_ranks` goes on: its own, or its share of another number of ranks'."""
    files = sorted(checkpoint.glob("since_log_*.json"), key=lambda file: int(file.stem.rsplit("_", 1)[1]))
    counts = [SinceLog(**json.loads(file.read_text(encoding="utf-8"))) for file in files]
    mine = counts[rank::num_ranks]
    return SinceLog(
        last_log=counts[0].last_log,
        loss=sum(one.loss for one in mine) * num_ranks / len(counts),  # it is averaged over ranks
        seconds=counts[0].seconds,
        sums=[sum(one.sums[place] for one in mine) for place in range(len(counts[0].sums))],
    )


def num_generators(checkpoint: Path) -> int:
    """Number of processes whose random numbers a checkpoint holds."""
    return len(list(checkpoint.glob("rng_state*.pth")))


def seed_anew(seed: int, step: int, rank: int) -> None:
    """Start all random numbers of this process from (seed, step, rank)."""
    set_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def set_options(
    optimizer: Any, scheduler: LambdaLR, groups: Iterable[dict[str, Any]], betas: tuple[float, float]
) -> None:
    """Give a restored optimizer the options of `groups` (name, lr, weight_decay) and the schedule's rate at its step.

    Loading took those of the checkpoint instead; where the recipe is the same, these are the same numbers.
    """
    wanted = {group["name"]: group for group in groups}
    for group, schedule in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        options = wanted[group["name"]]
        group["initial_lr"], group["weight_decay"], group["betas"] = options["lr"], options["weight_decay"], betas
        group["lr"] = options["lr"] * schedule(scheduler.last_epoch)
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
