"""The decoding child is stopped, killed, orphaned and forked for real, and one sample is all that it costs."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from evs_train.data.decoding import DECODER, KEPT_BYTES, Decoder, Decoding
from evs_train.data.sampling import FrameSampling
from evs_train.data.video import Clip, read_video
from evs_train.errors import MediaError
from tests.data.test_video import counters, write_video

FOUR = FrameSampling(num_frames=4)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_video(tmp_path / "clip.mp4", range(0, 4000, 100))


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Takes seconds to check."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    picture = np.random.default_rng(0).integers(0, 255, (480, 640, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 640, 480, "yuv420p"
        stream.options = {"preset": "ultrafast", "threads": "1", "g": "1"}
        for _ in range(600):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def kill_once_open(pid: int, number: signal.Signals, path: Path) -> None:
    """Send the signal as soon as the child has the file open, however fast it reads."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed by now
                if link.readlink() == path.resolve():
                    os.kill(pid, number)
                    return
        time.sleep(0.001)


def signalled(number: signal.Signals, path: Path, timeout: float = 60.0) -> MediaError:
    """Send the child a signal while it decodes; the error of that file."""
    read_video(path, FOUR, verify=False)  # it is there
    pid = DECODER.pid
    assert pid is not None
    killer = threading.Thread(target=kill_once_open, args=(pid, number, path))
    killer.start()
    try:
        with pytest.raises(MediaError) as caught:
            # Other limits than before: a check that is remembered would end before the signal.
            read_video(path, FOUR, decoding=Decoding(timeout=timeout, max_pixels=10_000_000 + int(number)))
    finally:
        killer.join()
    assert pid != DECODER.pid
    assert str(path) in caught.value.message
    return caught.value


def assert_reads(path: Path) -> None:
    clip = read_video(path, FOUR)
    assert np.abs(np.array(counters(clip.frames)) - [0, 13, 26, 39]).max() <= 1


def gone(pid: int, within: float = 5.0) -> bool:
    """Whether a process has ended, or is waiting to be collected."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_a_hang_costs_one_file(long: Path, clip: Path) -> None:
    """SIGSTOP: the child stands still in the middle of a file, as in a decoder that does not return."""
    begun = time.monotonic()
    error = signalled(signal.SIGSTOP, long, timeout=1.0)
    assert error.reason == "timeout"
    assert "data.decode_timeout" in error.hint
    assert time.monotonic() - begun < 10
    assert_reads(clip)


@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGSEGV, "crash"), (signal.SIGABRT, "crash"), (signal.SIGKILL, "out of memory")],
)
def test_a_crash_costs_one_file(long: Path, clip: Path, number: signal.Signals, reason: str) -> None:
    error = signalled(number, long)
    assert error.reason == reason
    assert reason != "crash" or number.name in error.message
    assert_reads(clip)


def test_a_child_that_died_between_files_is_nobodys_fault(clip: Path) -> None:
    assert_reads(clip)
    pid = DECODER.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)
    assert_reads(clip)


def test_the_deadline_is_for_progress_not_for_the_file(long: Path) -> None:
    """The deadline is a quarter of what this machine takes for the file."""

    def seconds(timeout: float) -> float:
        DECODER.close()  # it remembers what it has checked
        read_video(long, FOUR, verify=False)  # a child is there
        begun = time.monotonic()
        read_video(long, FOUR, decoding=Decoding(timeout=timeout))
        return time.monotonic() - begun

    timeout = max(seconds(60.0) / 4, 0.5)  # it reports five times a second
    assert seconds(timeout) > timeout, "the file is too short to show it"


def test_an_interrupted_request_does_not_answer_the_next(long: Path, clip: Path) -> None:
    read_video(long, FOUR, verify=False)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            read_video(long, FOUR, decoding=Decoding(max_pixels=9_000_000))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert_reads(clip)


def test_clips_do_not_share_memory(clip: Path, tmp_path: Path) -> None:
    """The child writes each clip over the last one."""
    first = read_video(clip, FOUR)
    kept = first.frames.copy()
    read_video(write_video(tmp_path / "other.mp4", range(0, 500, 100)), FOUR)
    assert np.array_equal(first.frames, kept)


def test_large_clips_own_their_memory(tmp_path: Path, clip: Path) -> None:
    path = write_video(tmp_path / "large.mp4", range(0, 1000, 100), (4096, 2304), {"preset": "ultrafast"})
    large = read_video(path, FrameSampling(num_frames=10), verify=False)
    assert large.frames.nbytes > KEPT_BYTES
    kept = large.frames[:, ::64, ::64].copy()
    assert_reads(clip)
    read_video(path, FrameSampling(num_frames=10), verify=False)
    assert np.array_equal(large.frames[:, ::64, ::64], kept)
    assert large.frames.flags.writeable


def test_no_descriptor_is_left_open(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_text("text")

    def read() -> None:
        read_video(clip, FOUR)
        with pytest.raises(MediaError):
            read_video(tmp_path / "bad.mp4", FOUR)

    read()
    gc.collect()  # what earlier tests left may hold some
    counts = [len(os.listdir(f"/proc/{pid}/fd")) for pid in (os.getpid(), DECODER.pid)]
    for _ in range(20):
        read()
    assert [len(os.listdir(f"/proc/{pid}/fd")) for pid in (os.getpid(), DECODER.pid)] == counts


CHILD_OF = """
import os, signal, sys, threading, time
from evs_train.data.decoding import DECODER, DEFAULTS
from evs_train.data.sampling import FrameSampling

def read(path, verify):
    DECODER.request(path, 60.0, path, DEFAULTS, FrameSampling(num_frames=4), verify)

read(sys.argv[1], False)
print(DECODER.pid, flush=True)
"""


@pytest.mark.parametrize(
    "end",
    [
        "",
        "os.kill(os.getpid(), signal.SIGKILL)",
        "os._exit(0)",
        "threading.Timer(0.5, os.kill, (os.getpid(), 9)).start(); read(sys.argv[2], True)",
    ],
    ids=["exit", "killed", "_exit", "killed while decoding"],
)
def test_no_child_outlives_its_parent(clip: Path, long: Path, end: str) -> None:
    command = [sys.executable, "-c", CHILD_OF + end, str(clip), str(long)]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert run.stdout, run.stderr
    assert gone(int(run.stdout))
    assert "Traceback" not in run.stderr


class Clips(Dataset[tuple[Clip | str, int | None]]):
    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Clip | str, int | None]:
        try:
            return read_video(self.paths[index], FOUR), DECODER.pid
        except MediaError as error:
            return error.reason, DECODER.pid


def first(batch: list[tuple[Clip | str, int | None]]) -> tuple[Clip | str, int | None]:
    return batch[0]


@pytest.mark.parametrize(("how", "num_workers"), [("fork", 2), ("spawn", 1)])
def test_every_loader_worker_has_its_own_child(clip: Path, tmp_path: Path, how: str, num_workers: int) -> None:
    assert_reads(clip)  # this process has a child, which forked workers must leave alone
    own = DECODER.pid
    (tmp_path / "bad.mp4").write_text("text")
    paths = [clip, clip, tmp_path / "bad.mp4", clip, clip, clip]
    loader = DataLoader(Clips(paths), num_workers=num_workers, multiprocessing_context=how, collate_fn=first)
    results = list(loader)
    assert [one if isinstance(one, str) else one.total_frames for one, _ in results] == [
        40,
        40,
        "not a video",
        40,
        40,
        40,
    ]
    pids = {pid for _, pid in results}
    assert len(pids) == num_workers
    assert own not in pids
    del loader
    assert all(gone(pid) for pid in pids if pid is not None)
    assert DECODER.pid == own
    assert_reads(clip)
    assert DECODER.pid == own


def test_a_process_forked_while_a_thread_decodes_can_read(clip: Path, long: Path) -> None:
    DECODER.close()  # it remembers what it has checked
    read_video(clip, FOUR)
    own = DECODER.pid
    thread = threading.Thread(target=read_video, args=(long, FOUR), kwargs={"decoding": Decoding(max_pixels=8_000_000)})
    thread.start()
    time.sleep(0.1)
    forked = os.fork()
    if forked == 0:
        signal.alarm(30)
        os._exit(0 if read_video(clip, FOUR).total_frames == 40 and DECODER.pid != own else 1)
    assert thread.is_alive(), "the file is too short to show it"
    assert os.waitpid(forked, 0)[1] == 0
    thread.join()
    assert DECODER.pid == own


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    one = Decoder()
    yield one
    one.close()


def test_threads_share_a_child(decoder: Decoder, clip: Path, tmp_path: Path) -> None:
    other = write_video(tmp_path / "other.mp4", range(0, 700, 100))
    seen: list[int] = []

    def read(path: Path, total: int) -> None:
        for _ in range(10):
            reply = decoder.request(str(path), 60.0, str(path), Decoding(), FOUR, True)
            seen.append(reply.facts["total_frames"] - total)

    threads = [threading.Thread(target=read, args=pair) for pair in ((clip, 40), (other, 7), (clip, 40))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [0] * 30


def test_the_child_starts_fast_and_small(decoder: Decoder, clip: Path) -> None:
    """torch, transformers or CUDA's libraries in it would take seconds, or hundreds of MB for each loader worker."""
    decoder.request(str(clip), 60.0, str(clip), Decoding(), FOUR, True)
    maps = Path(f"/proc/{decoder.pid}/maps").read_text()
    assert not [name for name in ("libtorch", "libcudart", "libcublas") if name in maps]
    status = dict(line.split(":", 1) for line in Path(f"/proc/{decoder.pid}/status").read_text().splitlines())
    assert int(status["VmRSS"].split()[0]) < 150_000


def test_the_limit_of_the_stack_is_no_limit_of_decoding(decoder: Decoder, clip: Path) -> None:
    """`ulimit -s` is what a thread's stack takes of the address space, unless the child says otherwise."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    large = 256 << 20 if hard == resource.RLIM_INFINITY else min(hard, 256 << 20)
    resource.setrlimit(resource.RLIMIT_STACK, (large, hard))
    try:
        reply = decoder.request(str(clip), 60.0, str(clip), Decoding(memory_mb=64), FOUR, True)
    finally:
        resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))
    assert reply.facts["total_frames"] == 40


def test_a_child_that_does_not_start_says_so(decoder: Decoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text(
        textwrap.dedent("""\
        #!/bin/sh
        exit 3
    """)
    )
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(RuntimeError, match="did not start"):
        decoder.request("clip", 60.0, "clip", Decoding(), FOUR, True)
