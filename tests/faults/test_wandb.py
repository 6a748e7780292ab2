"""W&B that cannot be reached, fails, is slow, hangs or dies: training goes on, at its own speed, and ends.

With the real wandb package against local servers.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from evs_train import tracking, tracking_worker
from evs_train.config import TrackingSection
from evs_train.tracking import ID_FILE, Tracker
from evs_train.uptrain import Run
from tests.faults.wandb_server import Server, closed_port, mute_port
from tests.runs import arguments, metrics, recipe_of

KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(autouse=True)
def _no_wandb_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def use(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)


@pytest.fixture
def record(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "record.json"
    path.parent.mkdir()
    path.write_text('{"recipe": {"seed": 7}}', encoding="utf-8")
    return path


def tracker_of(record: Path, timeout: float = 1.0) -> Tracker:
    return Tracker(TrackingSection(timeout=timeout), "a-name", record.parent)


def seconds_of(call: Callable[[], object]) -> float:
    begun = time.monotonic()
    call()
    return time.monotonic() - begun


def offline_files(output: Path) -> list[Path]:
    return sorted(output.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)


def test_servers_that_cannot_be_used(
    tmp_path: Path, record: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One refuses, one never answers, one fails: no waiting at the start, a bounded end, all logs on disk."""
    with ExitStack() as stack:
        urls = [closed_port(), stack.enter_context(mute_port()), stack.enter_context(Server(status=500).running()).url]
        trackers = []
        for number, url in enumerate(urls):
            use(monkeypatch, url)
            tracker = Tracker(TrackingSection(timeout=1.0), "a-name", tmp_path / str(number))
            begun = time.monotonic()
            tracker._begin(record, resumed=False)
            assert time.monotonic() - begun < 1.0
            trackers.append(tracker)
        for tracker in trackers:
            assert seconds_of(lambda: [tracker.log({"loss": 2.5 + step}, step) for step in range(100)]) < 0.5  # noqa: B023
        for tracker in trackers:
            assert seconds_of(lambda: tracker._end(0)) < 1.0 + tracking.GRACE_SECONDS  # noqa: B023
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 3
    assert all("W&B cannot be used and runs offline" in line for line in said), said
    for number in range(3):
        (file,) = offline_files(tmp_path / str(number))
        assert b"101.5" in file.read_bytes()  # the last log: none was lost


def test_a_server_that_falls_silent(
    record: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with Server().running() as server:
        use(monkeypatch, server.url)
        tracker = tracker_of(record)
        with tracker.running(record, resumed=False):
            tracker.log({"loss": 1.0}, 0)
            wait_for(lambda: any(b"UpsertBucket" in one for one in server.seen))
            server.silent.set()
            assert seconds_of(lambda: [tracker.log({"loss": 1.0}, step) for step in range(2000)]) < 2.0
            begun = time.monotonic()
        assert time.monotonic() - begun < 1.0 + tracking.GRACE_SECONDS
    assert capfd.readouterr().err == f"W&B run: {server.url}/e/p/runs/{(record.parent / ID_FILE).read_text()}"


def use_worker(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *without: tuple[str, str], wandb: str | None = None
) -> None:
    """Have a copy of tracking_worker.py started, with other parts in the place of these, and another package wandb."""
    text = Path(tracking_worker.__file__).read_text(encoding="utf-8")
    for part, to in without:
        assert text.count(part) == 1
        text = text.replace(part, to)
    (folder / "evs_train").mkdir(parents=True)
    (folder / "evs_train" / "__init__.py").touch()
    (folder / "evs_train" / "tracking_worker.py").write_text(text, encoding="utf-8")
    if wandb is not None:
        (folder / "wandb.py").write_text(wandb, encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])  # which its process is given


SOON = ("_HARD_SECONDS = 50.0", "_HARD_SECONDS = 3.0")
"""When that process ends itself: as late as it does so elsewhere the test would take a minute."""


def test_without_time_outs_wandbs_calls_would_last_until_the_hard_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], record: Path
) -> None:
    """Its `init` with a server that never answers, its `finish` with one that falls silent."""
    with Server().running() as mute, Server().running() as server:
        mute.silent.set()
        trackers = {}
        for name, url in (("init", mute.url), ("finish", server.url)):
            use(monkeypatch, url)
            trackers[name] = Tracker(TrackingSection(timeout=1.0), "a-name", tmp_path / name)
            with monkeypatch.context() as patch:
                use_worker(tmp_path / f"without_{name}", patch, (f'{name}_timeout=begin["timeout"],', ""), SOON)
                trackers[name]._begin(record, resumed=False)
        wait_for(lambda: bool(mute.seen), 60.0)
        assert select.select([trackers["finish"]._socket], [], [], 60.0)[0]  # it has begun, and says where
        server.silent.set()
        trackers["finish"].log({"loss": 1.0}, 0)
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda tracker: tracker._end(0), trackers.values()))
    said = sorted(capfd.readouterr().err.splitlines())
    (run,) = (tmp_path / "finish" / ID_FILE).read_text().splitlines()
    late = "W&B did not end in time; `wandb sync` sends what is on disk"
    assert said == [late, late, f"W&B run: {server.url}/e/p/runs/{run}"]


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "without the hard end"])
def test_a_hang_within_wandb_does_not_outlive_a_run_that_dies(
    guarded: bool, tmp_path: Path, record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is left to kill that process."""
    hangs = "import pathlib, time\npathlib.Path('hangs').touch()\ntime.sleep(1000)\n"
    guard = 'threading.Event().wait(begin["timeout"] + _HARD_SECONDS)'
    use_worker(tmp_path / "copy", monkeypatch, SOON if guarded else (guard, "threading.Event().wait()"), wandb=hangs)
    tracker = tracker_of(record)
    tracker._begin(record, resumed=False)
    assert tracker._child is not None
    assert tracker._socket is not None
    wait_for((record.parent / "hangs").exists)
    tracker._socket.close()  # as a SIGKILL does
    if guarded:
        assert tracker._child.wait(30) == 1
    else:
        with pytest.raises(subprocess.TimeoutExpired):
            tracker._child.wait(1.0 + 1.0 + 0.5)
        tracker._child.kill()
        tracker._child.wait()


def test_a_process_that_hangs(record: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A log is dropped rather than waited for, and the process is killed at the end."""
    check_a_hang(record, monkeypatch, capfd)


def _waits_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    send = socket.socket.send

    def sending(self: socket.socket, data: bytes) -> int:
        self.settimeout(1.1)
        try:
            return send(self, data)
        finally:
            self.setblocking(False)

    monkeypatch.setattr(socket.socket, "send", sending)


def _waits_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = subprocess.Popen.wait

    def waiting(self: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        killing = threading.Timer(2.0, self.kill)  # or the test would wait, too
        killing.start()
        return wait(self)

    monkeypatch.setattr(subprocess.Popen, "wait", waiting)


@pytest.mark.parametrize(
    ("wait", "words"), [(_waits_for_room, "a log is waited for"), (_waits_for_its_end, "its end is waited for")]
)
def test_without_limits_the_run_would_wait_for_it(
    wait: Callable[[pytest.MonkeyPatch], None],
    words: str,
    record: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    wait(monkeypatch)
    with pytest.raises(AssertionError, match=words):
        check_a_hang(record, monkeypatch, capfd)


def check_a_hang(record: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tracking, "GRACE_SECONDS", 0.5)
    tracker = tracker_of(record)
    with tracker.running(record, resumed=False):
        assert tracker._child is not None
        process = tracker._child
        process.send_signal(signal.SIGSTOP)
        for step in range(1_000_000):  # until what lies between the two processes is full
            seconds = seconds_of(lambda: tracker.log({"loss": 1.0}, step))  # noqa: B023
            assert seconds < 1.0, "a log is waited for"
            if tracker._dropped == 2:
                break
        begun = time.monotonic()
    assert time.monotonic() - begun < 6.0
    assert process.poll() == -signal.SIGKILL
    said = capfd.readouterr().err.splitlines()
    assert "does not keep up" in said[0]
    assert any("did not end within 1.5 s" in line for line in said), "its end is waited for"
    assert len(said) == 2


def test_a_process_that_dies(record: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tracker = tracker_of(record)
    with tracker.running(record, resumed=False):
        assert tracker._child is not None
        tracker._child.kill()
        tracker._child.wait()
        for step in range(10):
            tracker.log({"loss": 1.0}, step)
    (line,) = capfd.readouterr().err.splitlines()
    assert "W&B tracking has ended" in line


def test_a_run_that_dies_leaves_no_process(record: Path) -> None:
    tracker = tracker_of(record)
    tracker._begin(record, resumed=False)
    assert tracker._child is not None
    assert tracker._socket is not None
    tracker._socket.close()  # as a SIGKILL does
    assert tracker._child.wait(30) == 0


def test_a_resumed_run_goes_on_under_its_id(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server().running() as server:
        use(monkeypatch, server.url)
        for resumed in (False, True):
            tracker = tracker_of(record, timeout=20.0)
            with tracker.running(record, resumed=resumed):
                for step in (2, 3, 4) if resumed else (1, 2, 3):
                    tracker.log({"loss": step + resumed / 2}, step)
            run_id = (record.parent / ID_FILE).read_text().strip()
            begins = [json.loads(body[body.index(b'{"query"') :]) for body in server.seen if b"UpsertBucket" in body]
            assert {one["variables"]["name"] for one in begins} == {run_id}
            assert any(b"RunResumeStatus" in body for body in server.seen) == resumed
        # W&B leaves out steps that it has.
        assert [(line["step"], line["loss"]) for line in server.history] == [(1, 1), (2, 2), (3, 3), (4, 4.5)]


def test_training_without_a_server_and_its_continuation(
    tiny_checkpoint: Callable[[str], Path],
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Losses are those of an untracked run, to the bit; `wandb sync` sends both parts, one behind the other."""

    def train(name: str, **overrides: object) -> list[float]:
        words = arguments(tiny_checkpoint("qwen3_vl"), world, tmp_path / name, train__save_every=2, **overrides)
        Run(recipe_of(words)).train()
        return [line["loss"] for line in metrics(tmp_path / name)]

    alone = train("alone", train__steps=4)
    use(monkeypatch, closed_port())
    tracked = {"tracking__wandb": True, "tracking__timeout": 1.0, "train__pictures_every": 2}
    assert train("tracked", train__steps=4, **tracked) == alone
    assert capfd.readouterr().err.count("W&B ") == 1
    (tmp_path / "tracked" / "checkpoint-4").rename(tmp_path / "gone")
    monkeypatch.delenv("WANDB_API_KEY")  # without a key it is offline at once
    assert train("tracked", train__steps=4, train__resume=True, **tracked) == alone
    assert "W&B" not in capfd.readouterr().err
    first, second = offline_files(tmp_path / "tracked")
    run_id = (tmp_path / "tracked" / ID_FILE).read_text().strip()
    assert first.name == second.name == f"run-{run_id}.wandb"
    for name in (b"evs/video_tokens_after", b"evs/kept", b"lr/vision", b"tuning", b"data_fingerprint"):
        assert name in first.read_bytes(), name
    with Server().running() as server:
        use(monkeypatch, server.url)
        folders = [str(file.parent) for file in (second, first)]  # it goes by when they began
        subprocess.run([sys.executable, "-m", "wandb", "sync", *folders], cwd=tmp_path, check=True)
    begins = [json.loads(body[body.index(b'{"query"') :]) for body in server.seen if b"UpsertBucket" in body]
    assert {one["variables"]["name"] for one in begins} == {run_id}
    # Those logged twice are there twice. W&B numbers the later ones anew, and is told to draw by our number.
    sent = [(line["step"], line["loss"]) for line in server.history if "loss" in line]
    both = list(enumerate(alone, 1))
    assert sent == both + both[2:]
    drawn_by = json.loads(begins[-1]["variables"]["config"])["_wandb"]["value"]["m"]
    assert {one.get("1") or one["2"] for one in drawn_by} == {"step", "*"}


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)
