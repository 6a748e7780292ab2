"""Signals by which a scheduler announces that it will end a run: they ask for a checkpoint, not for the end.

SIGTERM (preemption, torchrun, `scancel`) and SIGUSR1 (Slurm's `--signal`) only set a flag, which the trainer adds up
over all ranks at the start of each step. A further signal ends the process at once. Signals within `SAME_SECONDS` of
the first are taken for the same request: where a whole process group is signalled, torchrun passes on to its ranks what
they have got already.

How: Python's own handlers run in the main thread, between bytecodes, so not while it waits in a collective for a rank
that is gone. The number of each signal is therefore written to a pipe by the interpreter's C handler
(`signal.set_wakeup_fd`), and a thread reads it. Invariant: outside `with`, signals do what they did before. Cost: a
thread that sleeps. It cannot save by itself, nor hasten the step that is being computed.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.context import ForkContext, ForkProcess
from types import FrameType, TracebackType
from typing import Any

from torch.utils.data import DataLoader

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAME_SECONDS = 5.0
_STOP = b"\0"  # no signal has this number


class Preemption:
    """While it is entered, `requested` says whether this process was told to save and end.

    Entered outside the main thread it does nothing: handlers can be set there only.
    """

    def __init__(self) -> None:
        self.requested = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._thread = threading.Thread(target=self._watch, name="preemption", daemon=True)
            self._thread.start()
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._handlers = {number: signal.signal(number, _seen) for number in SIGNALS}
            for number in SIGNALS:
                signal.siginterrupt(number, False)  # libraries need not expect EINTR
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.write(self._write, _STOP)  # closing it would not end the read: forked processes have it, too
        self._thread.join()
        os.close(self._read)
        os.close(self._write)
        self._thread = None

    def _watch(self) -> None:
        first: float | None = None
        while (byte := os.read(self._read, 1)) != _STOP:
            number, now = byte[0], time.monotonic()
            if number not in SIGNALS:
                continue  # another one that has a handler, such as SIGCHLD
            if first is None:
                first, self.requested = now, True
            elif now - first > SAME_SECONDS:
                os._exit(128 + number)


def _seen(number: int, frame: FrameType | None) -> None:
    """Nothing is left to do here: the number is in the pipe."""


def outlive_signals(loader: DataLoader[Any]) -> None:
    """Have the processes that `loader` will start outlive signals to the whole process group.

    They must go on until the checkpoint is written; torch's handler would end them, and with them the run. SIGTERM of
    their own parent still ends them, as the loader's shutdown may need.
    """
    if loader.num_workers:
        loader.multiprocessing_context = _Blocking()
    loader.worker_init_fn = functools.partial(_outlive_signals, loader.worker_init_fn)


class _Process(ForkProcess):
    """Starts with SIGTERM blocked, for all threads: torch starts some before it calls `worker_init_fn`."""

    def start(self) -> None:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Blocking(ForkContext):
    """How such processes are started."""

    Process = _Process


def _outlive_signals(init: Callable[[int], Any] | None, worker: int) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # SIGTERM is blocked in all threads, and waited for, since only that way says who sent it.
    threading.Thread(target=_obey, args=(os.getppid(),), name="signals", daemon=True).start()
    if init is not None:
        init(worker)


def _obey(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
