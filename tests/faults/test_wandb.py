"""W&B that cannot be reached, fails, is slow, hangs or dies: training goes on, at its own speed, and ends.

With the real wandb package against local servers.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from evs_train import tracking
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
    assert f"W&B run: {server.url}" in capfd.readouterr().err


def test_a_process_that_hangs(record: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A log is dropped rather than waited for, and the process is killed at the end."""
    monkeypatch.setattr(tracking, "GRACE_SECONDS", 0.5)
    tracker = tracker_of(record)
    with tracker.running(record, resumed=False):
        assert tracker._child is not None
        process = tracker._child
        process.send_signal(signal.SIGSTOP)
        for step in range(1_000_000):  # until what lies between the two processes is full
            assert seconds_of(lambda: tracker.log({"loss": 1.0}, step)) < 1.0  # noqa: B023
            if tracker._dropped == 2:
                break
        begun = time.monotonic()
    assert time.monotonic() - begun < 6.0
    assert process.poll() == -signal.SIGKILL
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2
    assert "does not keep up" in said[0]
    assert "did not end within 1.5 s" in said[1]


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
