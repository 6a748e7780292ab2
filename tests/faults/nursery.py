"""A process that imports everything once and forks children that train: so a real kill costs a second, not ten.

`python -m tests.faults.nursery CHECKPOINT` reads a job from each line of stdin and answers with the children's exit
codes, as JSON: `{"call": "module:function", "given": keyword arguments, "world": processes, "log": file,
"kill_after": seconds or null, "limit": seconds}`. When one child ends otherwise than with 0 the others are killed, as
torchrun does it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FAILED = 1
LOG = "nursery.log"


class Nursery:
    """The test's end of it."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.log = folder / LOG
        self.num_jobs = 0

    def run(
        self, call: str, world: int = 1, kill_after: float | None = None, limit: float = 200, **given: Any
    ) -> list[int]:
        """Exit codes of the children that make the call, negative ones for signals. A child that failed is an error."""
        self.num_jobs += 1
        log = self.folder / f"job{self.num_jobs}.log"
        job = {"call": call, "given": given, "world": world, "log": str(log), "kill_after": kill_after, "limit": limit}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(job), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, f"the nursery is gone: {self.log.read_text(errors='replace')[-6000:]}"
        codes: list[int] = json.loads(answer)
        assert FAILED not in codes, log.read_text(errors="replace")[-6000:]
        return codes


@contextlib.contextmanager
def nursery(folder: Path, checkpoint: Path) -> Iterator[Nursery]:
    """A nursery with its files in `folder`, for runs on `checkpoint`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.nursery", str(checkpoint)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(folder / LOG).open("w"),
        text=True,
    )
    with process:
        yield Nursery(process, folder)
        assert process.stdin is not None
        process.stdin.close()


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed on import
    import deepspeed  # noqa: F401
    import torch
    import transformers.models.qwen3_vl.processing_qwen3_vl  # noqa: F401
    from tqdm import tqdm

    import tests.faults.victims  # noqa: F401
    from evs_train.config import ModelSection
    from evs_train.models.loading import load_config, load_weights

    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # or it would start a thread
    model = ModelSection(path=sys.argv[1])
    load_weights(model, load_config(model.path), torch.float32)  # compiles hundreds of expressions, once for all
    _wait_for_threads(seconds=60)
    gc.collect()
    gc.freeze()  # children need not look through what is here, nor copy it
    for line in sys.stdin:
        print(json.dumps(_children(json.loads(line))), file=answers, flush=True)


def _wait_for_threads(seconds: float) -> None:
    """A fork would leave them behind, with their locks. The pool that loads weights is not waited for when it ends."""
    until = time.monotonic() + seconds
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    for thread in others:
        thread.join(max(0.0, until - time.monotonic()))
    assert threading.active_count() == 1, threading.enumerate()


def _children(job: dict[str, Any]) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    waiting = {_fork(job, rank, port): rank for rank in range(job["world"])}
    codes, died = [0] * job["world"], False
    until = began + min(job["limit"], job["kill_after"] or job["limit"])
    while waiting:
        for pid, rank in list(waiting.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del waiting[pid]
                codes[rank] = os.waitstatus_to_exitcode(status)
        if any(codes) or time.monotonic() > until:
            died = died or (-signal.SIGKILL in codes and until != float("inf"))
            for pid in waiting:
                os.kill(pid, signal.SIGKILL)
            until = float("inf")
        time.sleep(0.003)
    if died:  # the others lost their connection, or were killed for it
        codes = [code and -signal.SIGKILL for code in codes]
    return [FAILED] * job["world"] if time.monotonic() > began + job["limit"] else codes


def _fork(job: dict[str, Any], rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = FAILED
    try:
        nothing, log = os.open(os.devnull, os.O_RDONLY), os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for fd, source in ((0, nothing), (1, log), (2, log)):
            os.dup2(source, fd)
        if job["world"] > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["world"], "LOCAL_WORLD_SIZE": job["world"]}
            os.environ.update({name: str(value) for name, value in names.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        module, name = job["call"].split(":")
        code = getattr(importlib.import_module(module), name)(rank=rank, **job["given"]) or 0
    except BaseException:  # noqa: BLE001 (the child must not go on as a second nursery)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
