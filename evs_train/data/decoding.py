"""The parent's side of decoding: one child process that opens foreign files, and can be killed.

Invariant: whatever a file does to the decoder (hang, crash, eat memory) costs that one file. A hang ends in SIGKILL,
and the next file finds a new child. No child outlives its parent, however that one ends. A reply is never taken for
that of another request: whenever one is broken off, the child goes with it.

How: the child writes frames into anonymous shared memory (memfd) whose descriptor came back over a socket: no name is
left behind, and the size of /dev/shm does not matter. The memory of a usual clip is kept for the next one and its
frames are copied out, once: new shared pages cost more than the copy (measured: 9 ms and 1 ms for 6 MB). The
deadline is for progress, not for the whole file: the child reports while frames come, so a long film on a busy machine
is not taken for a hang. Every process that reads media has its own child, whether it was forked or spawned.

Cost: see benchmarks/decoding.py: about 0.25 s and 50 MB of memory for each child, well under a millisecond for a file.
Linux only. What happens in the child is in `decode_worker.py`; this module imports no decoder.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from evs_train.errors import MediaError

Backend = Literal["auto", "decord", "pyav"]
KEPT_BYTES = 256 << 20
"""Shared memory up to this size is used again; that of a larger clip becomes the clip's own."""
START_SECONDS = 300.0
"""How long a child may take to start: its imports may come from a slow file system."""


@dataclass(frozen=True)
class Decoding:
    """How media are decoded, and what is refused. None takes a limit away.

    Args:
        backend: decord, PyAV, or decord first and PyAV for what it cannot read.
        frames_fps: frames per second of folders of frame images, which do not tell it themselves.
        timeout: seconds in which the decoder must get on: open the file, or reach the next frame.
        max_pixels: of one frame or image.
        max_seconds: of a video.
        max_frames: in the video file, not of those sampled.
        memory_mb: address space (MiB) for decoding one file, the sampled frames included.
    """

    backend: Backend = "auto"
    frames_fps: float | None = None
    timeout: float | None = 60.0
    max_pixels: int | None = 100_000_000
    max_seconds: float | None = 21_600.0
    max_frames: int | None = 2_000_000
    memory_mb: int | None = 8192


DEFAULTS = Decoding()


@dataclass(frozen=True)
class Reply:
    """What the child says of a medium, and its pixels: (F, H, W, 3) or (H, W, 3) uint8, in memory of their own."""

    facts: dict[str, Any]
    pixels: npt.NDArray[np.uint8]


class Decoder:
    """A child process that decodes one medium after the other. Threads wait for one another.

    It is started by the first request, and again after it was lost. It ends with this process, by itself.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._shared: mmap.mmap | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the child, if there is one."""
        return None if self._child is None else self._child.pid

    def request(self, name: str, timeout: float | None, *request: Any) -> Reply:
        """Have the child decode one medium.

        Args:
            name: of the medium, for messages.
            timeout: see `Decoding`.
            request: what `decode_worker.answer` takes.

        Raises:
            MediaError: the medium cannot be used, for whatever reason; or the child was lost over it.
        """
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._start()
            assert self._socket is not None
            self._socket.settimeout(timeout)
            try:
                message = pickle.dumps(request)
                self._socket.sendall(len(message).to_bytes(8, "little") + message)
                facts, memory = self._receive()
                refusal = MediaError(*facts["error"]) if "error" in facts else None
                pixels = None if refusal else self._pixels(memory, facts.pop("shape"))
            except TimeoutError as error:
                self.close()
                raise MediaError(
                    f"{name}: the decoder made no progress for {timeout:g} s and was killed",
                    "remove its rows; or raise data.decode_timeout, if the file lies on slow storage",
                    "timeout",
                ) from error
            except (EOFError, ConnectionError) as error:
                raise self._lost(name) from error
            except BaseException:  # an interrupt, say: the reply to come must not be taken for that of the next request
                self.close()
                raise
            # Decoders do not clean up after themselves when memory runs out, and may leave something behind otherwise.
            if facts.pop("grown") or (refusal and refusal.reason == "out of memory"):
                self.close()
        if refusal:
            raise refusal
        assert pixels is not None
        return Reply(facts, pixels)

    def close(self) -> None:
        """Kill the child, if there is one."""
        child, self._child, self._shared = self._child, None, None
        if self._socket is not None:
            self._socket.close()
        if child is not None:
            child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it waits in the kernel for a disk: it dies later
                child.wait(5)

    def forget(self) -> None:
        """In a forked process: leave the parent's child to the parent."""
        if self._socket is not None:
            self._socket.close()
        if self._child is not None:
            self._child.returncode = 0  # or its destructor would look for it among this process's children
        self._lock = threading.Lock()  # another thread may have held it
        self._child, self._socket, self._shared = None, None, None

    def _start(self) -> None:
        self.close()
        # A child is bound to the thread that starts it (PR_SET_PDEATHSIG), which only makes sense for the main one.
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-P", "-m", "evs_train.data.decode_worker", str(theirs.fileno()), str(parent)]
            paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
            # One thread: loaders run over files, and idle threads of NumPy's libraries cost memory.
            single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            self._child = subprocess.Popen(  # noqa: S603 (our own module)
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, **single, "PYTHONPATH": paths},
            )
        self._socket.settimeout(START_SECONDS)
        try:
            self._receive()
        except (EOFError, OSError) as error:
            self.close()
            raise RuntimeError("the process that decodes media did not start; its own error stands above") from error

    def _receive(self) -> tuple[dict[str, Any], int | None]:
        """The next message (a line of JSON) and the descriptor that came with it. Empty lines report progress."""
        assert self._socket is not None
        line, descriptors = b"", list[int]()
        try:
            while not line.endswith(b"\n"):
                data, received, _, _ = socket.recv_fds(self._socket, 1 << 16, 1)
                descriptors += received
                if not data:
                    raise EOFError
                line = (line + data).lstrip(b"\n")
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        return json.loads(line), descriptors[0] if descriptors else None

    def _pixels(self, memory: int | None, shape: list[int]) -> npt.NDArray[np.uint8]:
        """The child's pixels, in the memory of this descriptor or else of the last one."""
        if memory is not None:
            try:
                self._shared = mmap.mmap(memory, 0)
            finally:
                os.close(memory)
        assert self._shared is not None
        size = math.prod(shape)
        pixels = np.frombuffer(self._shared, np.uint8, size).reshape(shape)
        if size <= KEPT_BYTES:
            return pixels.copy()
        self._shared = None  # the child has let go of it, too; the array keeps it alive
        return pixels

    def _lost(self, name: str) -> MediaError:
        """The child is gone: collect it, and say of what it died."""
        child = self._child
        assert child is not None
        self.close()
        if child.returncode == -signal.SIGKILL:
            cause = "killed from outside; by the kernel, most likely, for want of memory"
            return MediaError(f"{name}: the decoder was {cause}", "remove its rows", "out of memory")
        how = signal.Signals(-child.returncode).name if child.returncode < 0 else f"exit code {child.returncode}"
        return MediaError(f"{name}: the decoder crashed ({how})", "remove its rows", "crash")


DECODER = Decoder()
"""The child of this process."""
os.register_at_fork(after_in_child=DECODER.forget)
