"""The processes of a run: how they are connected, how long they wait, and what all of them must see alike.

Invariant: a process that waits for the others in a collective gives up after `train.timeout_minutes`, in every group,
DeepSpeed's own included; and no run begins whose processes would write to different folders of the same name, or read
by different plans. Cost: three small exchanges when a run begins. Processes are started by torchrun
(`launch/multinode.sh`), not here.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
import warnings
from datetime import timedelta
from pathlib import Path

from torch import distributed
from torch.distributed import distributed_c10d

from evs_train.errors import RecipeError

SEEN_WITHIN_SECONDS = 10.0
"""How long a file of another node may take to be seen. Its name is new, so no file system remembers it as missing."""


def connect_on_cpu(minutes: float) -> None:
    """Connect the processes that torchrun started, by gloo. transformers would do it with a time-out of its own.

    Its `ddp_timeout` is not passed on where there is no GPU (read: `TrainingArguments._setup_devices`).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=timedelta(minutes=minutes))


def connect_deepspeed(minutes: float) -> None:
    """Make the process group known to DeepSpeed, with this time-out for what it waits for."""
    import deepspeed  # noqa: PLC0415 (imported late: it is slow, and says so on stderr)

    # On a CPU it would compile collectives over shared memory first: a minute, and a compiler. gloo has them.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.init_distributed(
        dist_backend=distributed.get_backend(), verbose=False, timeout=timedelta(minutes=minutes)
    )
    deepspeed.utils.groups._get_data_parallel_group()  # made now, or it would not have our time-out


def wait_at_most(minutes: float) -> None:
    """Give every process group there is this time-out. A group made later has torch's default for its backend.

    DeepSpeed's groups would have it, too, whatever their parent's: 10 minutes with NCCL (read: its `new_group`).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its public successor is newer than the oldest torch we take
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(timedelta(minutes=minutes), group)


def share_folder(folder: Path) -> None:
    """Make `folder`, and see that it is one and the same in all processes. All must call it.

    The first process leaves a file there whose name nobody could know, and the others look for it.

    Raises:
        RecipeError: in all processes alike: it cannot be made, or is not shared; which processes do not see it.
    """
    together = distributed.is_initialized()
    rank = distributed.get_rank() if together else 0
    mark = folder / f".shared-{uuid.uuid4().hex}"
    fault = _prepare(folder, mark if together and rank == 0 else None)
    if not together:
        if fault:
            raise RecipeError(fault)
        return
    told = [(mark.name, socket.gethostname())]
    distributed.broadcast_object_list(told)
    name, host = told[0]
    if not fault and not _seen(folder / name):
        fault = f"output_dir: {folder} is not the folder of this name that process 0 on {host} writes to"
    faults: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(faults, fault and f"process {rank} on {socket.gethostname()}: {fault}")
    if rank == 0:
        mark.unlink(missing_ok=True)
    if any(faults):
        raise RecipeError("; ".join(filter(None, faults)), "put output_dir on a file system that all nodes share")


def agree_on(plan: str) -> None:
    """See that all processes have the same plan, or they would wait for one another for ever. All must call it.

    A file that one of them could not read while it planned is enough to make them differ.

    Raises:
        RecipeError: in all processes alike: what each of them planned.
    """
    plans: list[str] = [""] * distributed.get_world_size()
    distributed.all_gather_object(plans, plan)
    if len(set(plans)) > 1:
        of_ranks = "; ".join(f"process {rank}: {one}" for rank, one in enumerate(plans))
        raise RecipeError(
            f"the processes planned different runs: {of_ranks}",
            "all must see the same files; evs-train check writes an index that all of them then read",
        )


def _prepare(folder: Path, mark: Path | None) -> str | None:
    """Make `folder`, and the file `mark` in it, or say what is wrong."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"output_dir: {folder} cannot be made: {error.strerror}"
    try:
        if mark is not None:
            mark.touch()
    except OSError as error:
        return f"output_dir: {folder} cannot be written to: {error.strerror}"
    return None


def _seen(file: Path) -> bool:
    deadline = time.monotonic() + SEEN_WITHIN_SECONDS
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
