"""The process that opens foreign files: `python -m evs_train.data.decode_worker SOCKET PARENT`, see `decoding.py`.

It answers one request after the other, and ends when its parent does: at the next read from the socket, or at once by
SIGKILL of the kernel (PR_SET_PDEATHSIG). Invariant: a request ends in one reply, or in the end of this process.

Cost: torch, transformers and CUDA's libraries are not loaded, so it starts in 0.25 s and takes 50 MB. A request takes
some tenths of a millisecond; frames are decoded into memory that it shares with the parent.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import pickle
import resource
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from evs_train.data.decoded import Pixels, Sink
from evs_train.data.decoding import DEFAULTS, KEPT_BYTES, Decoding
from evs_train.data.sampling import FrameSampling
from evs_train.data.sources import FrameList, Source, name_of
from evs_train.errors import MediaError

PROGRESS_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Worker:
    """Serves one parent over one socket."""

    def __init__(self, connection: socket.socket) -> None:
        from evs_train.data import decode, images  # noqa: PLC0415 (the decoders: after what `main` does)

        self._read_video, self._read_image = decode.read_video, images.read_image
        self._connection = connection
        self._shared: mmap.mmap | None = None  # where pixels go
        self._unsent: int | None = None  # its descriptor, until the parent has it
        self._reported = 0.0
        self._decoding = DEFAULTS
        self._sink = Sink(self._allocate, self._progress)
        self._own = _address_space()
        self._most: int | None = None  # bytes that this file may take

    def serve(self) -> None:
        """Answer requests until the parent hangs up."""
        self._connection.sendall(b"{}\n")
        with self._connection.makefile("rb") as requests:
            while length := requests.read(8):
                request = _exactly(requests, int.from_bytes(length, "little"))
                source, decoding, *rest = pickle.loads(request)  # noqa: S301 (our parent's)
                if decoding != self._decoding:  # what is remembered of a file holds it: one object for all files
                    self._decoding = decoding
                decoding = self._decoding
                facts = self.answer(source, decoding, *rest)
                self._reply({**facts, "grown": self._has_grown(decoding)})

    def answer(
        self,
        source: Source,
        decoding: Decoding,
        sampling: FrameSampling | None = None,
        verify: bool = True,
        suits_decord: bool = False,
    ) -> dict[str, Any]:
        """Decode a video, or an image where no `sampling` is given; what is known of it, or its error."""
        name = name_of(source)
        self._reported = time.monotonic()
        try:
            self._limit_memory(decoding.memory_mb)
            if sampling is None:
                assert not isinstance(source, FrameList)
                pixels = self._read_image(source, decoding)
                self._allocate(pixels.shape)[:] = pixels
                return {"shape": pixels.shape}
            decoded = self._read_video(
                source, sampling, verify=verify, suits_decord=suits_decord, decoding=decoding, sink=self._sink
            )
            facts = {name: value for name, value in vars(decoded).items() if name != "frames"}
            return {**facts, "shape": decoded.frames.shape}
        except MediaError as error:
            return {"error": [error.message, error.hint, error.reason]}
        except MemoryError:
            advice = "lower data.max_frames, or raise data.decode_memory_mb"
            message = f"{name}: decoding needs more than data.decode_memory_mb = {decoding.memory_mb} MiB"
            return {"error": [message, advice, "out of memory"]}
        except Exception as error:  # noqa: BLE001 (decoders raise anything on foreign bytes)
            return {"error": [f"{name}: cannot be decoded: {error!r}", "remove its rows", "undecodable"]}

    def _reply(self, facts: dict[str, Any]) -> None:
        """Send a line, and with its first byte the descriptor of the pixels' memory where the parent has not got it."""
        line = json.dumps(facts).encode() + b"\n"
        memory, self._unsent = self._unsent, None
        if memory is not None and "error" not in facts:
            socket.send_fds(self._connection, [line[:1]], [memory])
            line = line[1:]
        self._connection.sendall(line)
        if memory is not None:
            os.close(memory)
            if "error" in facts:
                self._shared = None
        if math.prod(facts.get("shape", ())) > KEPT_BYTES:
            self._shared = None

    def _allocate(self, shape: tuple[int, ...]) -> Pixels:
        """Memory that the parent can map, too: that of the last request, or new where it does not do."""
        size = math.prod(shape)
        if self._most is not None and size > self._most:  # whatever an earlier file left behind that could hold them
            raise MemoryError
        if self._shared is None or len(self._shared) < size:
            if self._unsent is not None:  # of a decoder that gave up
                os.close(self._unsent)
            self._unsent = os.memfd_create("evs_train_pixels")
            os.ftruncate(self._unsent, size)
            try:
                self._shared = mmap.mmap(self._unsent, size)
            except OSError as error:
                raise MemoryError from error
        return np.frombuffer(self._shared, np.uint8, size).reshape(shape)

    def _progress(self) -> None:
        now = time.monotonic()
        if now - self._reported > PROGRESS_SECONDS:
            self._reported = now
            self._connection.sendall(b"\n")

    def _limit_memory(self, memory_mb: int | None) -> None:
        """What earlier files left behind is no room for this one: neither their pixels nor anything else."""
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        limit = most
        self._most = None if memory_mb is None else memory_mb << 20
        if memory_mb is not None:
            if self._kept() > memory_mb << 18:  # a quarter of the limit: the decoder may need it
                self._shared = None
            limit = _address_space() - self._kept() + (memory_mb << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))

    def _has_grown(self, decoding: Decoding) -> bool:
        """Whether decoders left so much behind that a new process should go on."""
        most = decoding.memory_mb
        return most is not None and _address_space() - self._kept() - self._own > most << 20

    def _kept(self) -> int:
        return 0 if self._shared is None else len(self._shared)


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()


def _make_stacks_usual() -> None:
    """Threads of decoders get 8 MiB of stack, whatever `ulimit -s` says: it is address space, and so is limited."""
    libc = ctypes.CDLL(None)
    attributes = ctypes.create_string_buffer(256)  # pthread_attr_t has 56 bytes on x86-64, 64 on arm64
    libc.pthread_attr_init(attributes)
    libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(8 << 20))
    libc.pthread_setattr_default_np(attributes)


def _exactly(requests: BinaryIO, size: int) -> bytes:
    data = requests.read(size)
    if len(data) < size:
        sys.exit(0)  # the parent is gone
    return data


def main() -> None:
    """Watch the parent, then serve it."""
    descriptor, parent = map(int, sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # it is for the parent, which ends this process
    if parent:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before the call
            sys.exit(0)
    _make_stacks_usual()
    # decord would load all of CUDA from NVIDIA's packages, 0.4 s and 600 MB; frames are decoded on the host.
    sys.modules["nvidia"] = None  # type: ignore[assignment]
    with socket.socket(fileno=descriptor) as connection:
        Worker(connection).serve()


if __name__ == "__main__":
    main()
