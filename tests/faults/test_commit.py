"""Checkpoints of plain files: what is whole, what rotation leaves, and what a full disk or a lost sync does to them.

The last part takes each guard away and shows that a check turns red.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evs_train import commit, disk
from evs_train.commit import MANIFEST, Checkpoints, Ranks
from evs_train.errors import StorageError

FILES = {"model.safetensors": b"w" * 5000, "trainer_state.json": b"{}", "global_step1/shard_0.pt": b"s" * 3000}


def content(files: dict[str, bytes] = FILES) -> Callable[[Path], None]:
    """Writes `files` into the only checkpoint of a staging folder."""

    def write(staging: Path) -> None:
        folder = staging / staging.name.removeprefix(".staging-").rsplit("-", 1)[0]
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)

    return write


def saved(output: Path, *steps: int) -> Checkpoints:
    output.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(output)
    for step in steps:
        checkpoints.save(f"checkpoint-{step}", step, content())
    return checkpoints


def names(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir())


def test_a_manifest_lists_every_file_with_size_and_hash(tmp_path: Path) -> None:
    saved(tmp_path, 4)
    assert names(tmp_path) == ["checkpoint-4"]
    manifest = json.loads((tmp_path / "checkpoint-4" / MANIFEST).read_text())
    assert manifest["step"] == 4
    assert manifest["evs_train"]
    assert manifest["files"] == {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in FILES.items()
    }


def cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 4000)


def flip(folder: Path) -> None:
    data = bytearray((folder / "global_step1" / "shard_0.pt").read_bytes())
    data[100] ^= 1
    (folder / "global_step1" / "shard_0.pt").write_bytes(data)


def link(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "elsewhere")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere")


def leave(folder: Path) -> None:
    """Lists a file that lies outside."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["../checkpoint-1/model.safetensors"] = manifest["files"].pop("model.safetensors")
    (folder / MANIFEST).write_text(json.dumps(manifest))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (cut, "model.safetensors has 4000 bytes instead of 5000"),
    "one bit": (flip, "global_step1/shard_0.pt is not what was written"),
    "missing": (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "added": (lambda folder: (folder / "optimizer.pt").write_bytes(b"?"), "optimizer.pt is not listed"),
    "link": (link, "is not a regular file"),
    "outside": (leave, "../checkpoint-1/model.safetensors is missing"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), f"it has no {MANIFEST}"),
    "no JSON": (lambda folder: (folder / MANIFEST).write_text("{"), "is damaged"),
    "other JSON": (lambda folder: (folder / MANIFEST).write_text('{"files": [], "step": 2}'), "is damaged"),
    "renamed": (lambda folder: folder.rename(folder.with_name("checkpoint-9")), "is of step 2"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_newest_whole_one_is_the_latest_and_others_are_named(damage: str, tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    ruin, words = DAMAGE[damage]
    ruin(tmp_path / "checkpoint-2")
    before = names(tmp_path)
    found = Checkpoints(tmp_path).newest_whole()
    assert found.path == tmp_path / "checkpoint-1"
    ((name, fault),) = found.broken.items()
    assert name == ("checkpoint-9" if damage == "renamed" else "checkpoint-2")
    assert words in fault
    assert names(tmp_path) == before  # nothing is deleted


def test_who_hashed_a_checkpoint_sees_later_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not hashed again, unless somebody touched it."""
    checkpoints, hashed = saved(tmp_path, 1, 2), []
    original = commit.entry_of

    def counted(path: Path) -> Any:
        hashed.append(path.name)
        return original(path)

    monkeypatch.setattr(commit, "entry_of", counted)
    assert checkpoints.fault_of("checkpoint-2") is None
    assert hashed == []
    flip(tmp_path / "checkpoint-2")
    assert "is not what was written" in str(checkpoints.fault_of("checkpoint-2"))
    assert len(hashed) == len(FILES)
    assert "is not what was written" in str(checkpoints.fault_of("checkpoint-2"))


def test_a_broken_one_is_made_again(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    cut(tmp_path / "checkpoint-2")
    assert saved(tmp_path, 2).newest_whole().path == tmp_path / "checkpoint-2"
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_rotation_leaves_the_newest(keep: int, tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, *range(8, 13))
    checkpoints.rotate(keep)
    assert names(tmp_path) == sorted(f"checkpoint-{step}" for step in range(13 - max(keep, 2), 13))
    assert checkpoints.newest_whole().path == tmp_path / "checkpoint-12"


@pytest.mark.parametrize("anew", [True, False])
def test_rotation_counts_whole_ones_only(anew: bool, tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2, 3, 4)
    flip(tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-0").mkdir()  # without a manifest: not ours
    (Checkpoints(tmp_path) if anew else checkpoints).rotate(2)
    assert names(tmp_path) == ["checkpoint-0", "checkpoint-2", "checkpoint-3", "checkpoint-4"]
    cut(tmp_path / "checkpoint-4")
    checkpoints.rotate(2)
    assert "checkpoint-2" in names(tmp_path)


def test_what_kills_left_is_cleaned(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    for name in (".staging-checkpoint-2-0a", ".removed-checkpoint-0-0b"):
        (tmp_path / name / "deep").mkdir(parents=True)
    checkpoints.clean()
    assert names(tmp_path) == ["checkpoint-1"]


class Together:
    """Processes played by threads: `gather` joins their lists, and waits for all."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=20)
        self.given: list[list[Any]] = [[] for _ in range(world)]

    def of(self, rank: int) -> Ranks:
        def gather(items: list[Any]) -> list[Any]:
            self.given[rank] = items
            self.barrier.wait()
            joined = [item for of_rank in self.given for item in of_rank]
            self.barrier.wait()
            return joined

        return Ranks(rank, len(self.given), gather)

    def run(self, action: Callable[[Ranks], Any]) -> list[Any]:
        """What each rank's action gives, or raises."""
        outcomes: list[Any] = [None] * len(self.given)

        def play(rank: int) -> None:
            try:
                outcomes[rank] = action(self.of(rank))
            except StorageError as error:
                outcomes[rank] = error

        threads = [threading.Thread(target=play, args=(rank,)) for rank in range(len(self.given))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes


def shard_of(ranks: Ranks, delay: Callable[[], Any] = lambda: None) -> Callable[[Path], None]:
    """What one rank writes; the second one takes its time."""

    def write(staging: Path) -> None:
        if ranks.rank:
            delay()
        content({f"shard_{ranks.rank}.pt": bytes([ranks.rank]) * 1000})(staging)

    return write


def test_processes_write_into_one_folder_and_share_the_hashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: dict[int, list[str]] = {}
    original = commit.entry_of

    def counted(path: Path) -> Any:
        hashed.setdefault(threading.get_ident(), []).append(path.name)
        return original(path)

    monkeypatch.setattr(commit, "entry_of", counted)

    def save(ranks: Ranks) -> Any:
        checkpoints = Checkpoints(tmp_path, ranks)
        checkpoints.save("checkpoint-1", 1, shard_of(ranks))
        return Checkpoints(tmp_path, ranks).newest_whole()

    found = Together(3).run(save)
    assert [one.path for one in found] == [tmp_path / "checkpoint-1"] * 3
    assert len(hashed) == 3
    assert all(len(files) == 2 for files in hashed.values())  # one when it is saved, one when it is verified


@pytest.mark.parametrize("told", [True, False], ids=["told", "each its own"])
def test_all_write_into_the_folder_that_the_first_one_named(told: bool, tmp_path: Path) -> None:
    """With names of their own, the one that is committed would lack what the others wrote."""

    def save(ranks: Ranks) -> None:
        names = [] if told else [f"{ranks.rank:08x}"]
        gather = ranks.gather
        ranks = replace(ranks, gather=lambda items: [names.pop()] if names else gather(items))
        Checkpoints(tmp_path, ranks).save("checkpoint-1", 1, shard_of(ranks))

    Together(2).run(save)
    assert Checkpoints(tmp_path).fault_of("checkpoint-1") == (None if told else "shard_1.pt is missing")


def saved_while_another_one_writes(output: Path, *, waits: bool = True) -> list[Any]:
    """What each of two processes makes of a save in which the second is late.

    safetensors writes under another name first, which is gone when it is looked at again.
    """
    is_writing = threading.Event()

    def save(ranks: Ranks) -> None:
        gather = ranks.gather
        if not waits:
            ranks = replace(ranks, gather=lambda items: items if items == [None] else gather(items))

        def write(staging: Path) -> None:
            content({"shard_0.pt": b"done"})(staging)
            if ranks.rank == 0:
                is_writing.wait(20)
                return
            half = staging / "checkpoint-1" / ".tmp"
            half.write_bytes(b"half")
            is_writing.set()
            time.sleep(0.3)
            half.rename(half.with_name("shard_1.pt"))

        Checkpoints(output, ranks).save("checkpoint-1", 1, write)

    return Together(2).run(save)


def test_nobody_looks_at_files_that_another_process_still_writes(tmp_path: Path) -> None:
    assert saved_while_another_one_writes(tmp_path) == [None, None]
    assert Checkpoints(tmp_path).newest_whole().path == tmp_path / "checkpoint-1"


def test_without_waiting_they_would(tmp_path: Path) -> None:
    assert [type(one) for one in saved_while_another_one_writes(tmp_path, waits=False)] == [StorageError] * 2


def test_a_failure_on_one_process_is_raised_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = commit.entry_of

    def fails(path: Path) -> Any:
        if path.name == "shard_1.pt":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return original(path)

    monkeypatch.setattr(commit, "entry_of", fails)
    found = Together(2).run(lambda ranks: Checkpoints(tmp_path, ranks).save("checkpoint-1", 1, shard_of(ranks)))
    assert [type(one) for one in found] == [StorageError] * 2
    assert all("shard_1.pt" in str(one) and "bytes free" in str(one) for one in found)
    assert names(tmp_path) == []


class Disk:
    """A disk that refuses the call of this number: an `open`, a `write`, an fsync, a rename, a new folder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.number, self.calls = number, 0
        for owner, name in ((os, "fsync"), (os, "rename"), (os, "mkdir")):
            monkeypatch.setattr(owner, name, self.refusing(getattr(owner, name)))
        opened = io.open

        def refusing_open(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if "w" not in mode:
                return opened(path, mode, *args, **kwargs)
            self.count(path)
            return Refusing(opened(path, mode, *args, **kwargs), self)

        monkeypatch.setattr(io, "open", refusing_open)

    def count(self, *args: Any) -> None:
        self.calls += 1
        if self.calls == self.number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]) if args else None)

    def refusing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count(*args)
            return original(*args, **kwargs)

        return call


class Refusing:
    """An open file whose writes are counted."""

    def __init__(self, file: Any, full: Disk) -> None:
        self.file, self.full = file, full

    def __enter__(self) -> Refusing:
        return self

    def __exit__(self, *args: Any) -> None:
        self.file.close()

    def write(self, data: Any) -> None:
        self.full.count(self.file.name)
        self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_a_full_disk_at_any_call_leaves_what_was_there(tmp_path: Path) -> None:
    """Open, write, sync and rename fail one after the other, until nothing fails any more."""
    messages = []
    for number in range(1, 200):
        output = tmp_path / str(number)
        checkpoints = saved(output, 1, 2)
        with pytest.MonkeyPatch.context() as patch:
            full = Disk(patch, number)
            try:
                checkpoints.save("checkpoint-3", 3, content())
                checkpoints.rotate(2)
            except StorageError as error:
                messages.append(error.message)
        if full.calls < number:
            break
        assert not [name for name in names(output) if name.startswith(".staging")], number
        newest = Checkpoints(output).newest_whole()
        assert newest.path in (output / "checkpoint-2", output / "checkpoint-3"), number
        assert newest.broken == {}
        checkpoints.clean()  # room was made, and the run goes on
        saved(output, 3).rotate(2)
        assert names(output) == ["checkpoint-2", "checkpoint-3"]
    for word in (str(tmp_path), "bytes free", "No space left on device"):
        assert all(word in message for message in messages)
    assert 15 < len(messages) < 100


def test_a_disk_with_too_little_room_is_refused_at_the_start(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    Checkpoints(tmp_path).require_space(free // 2, "this run")
    found = Together(2).run(lambda ranks: Checkpoints(tmp_path, ranks).require_space(2 * free, "this run"))
    for error in found:
        assert isinstance(error, StorageError)
        assert str(tmp_path) in error.message
        assert str(2 * free) in error.message
        assert " bytes free" in error.message


class PowerLoss:
    """Knows what was synced; `strike` takes the content of all files that were not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: set[int] = set()
        original = os.fsync

        def fsync(handle: int) -> None:
            original(handle)
            self.synced.add(os.fstat(handle).st_ino)

        monkeypatch.setattr(os, "fsync", fsync)

    def strike(self, output: Path) -> None:
        for path in output.rglob("*"):
            if path.is_file() and path.stat().st_ino not in self.synced:
                os.truncate(path, 0)


def newest_after_power_loss(output: Path, monkeypatch: pytest.MonkeyPatch) -> Path | None:
    power = PowerLoss(monkeypatch)
    saved(output, 1, 2, 3).rotate(2)
    power.strike(output)
    return Checkpoints(output).newest_whole().path


def test_what_is_saved_survives_a_loss_of_power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert newest_after_power_loss(tmp_path, monkeypatch) == tmp_path / "checkpoint-3"


@pytest.mark.parametrize("missing", ["files", "manifest"])
def test_without_a_sync_it_would_not(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "files":
        monkeypatch.setattr(commit, "sync_all", lambda folder: {n: s[0] for n, s in disk.stamps_of(folder).items()})
    else:
        monkeypatch.setattr(commit, "write_synced", lambda path, text: path.write_text(text))
    assert newest_after_power_loss(tmp_path, monkeypatch) is None


@pytest.mark.parametrize("synced", [True, False], ids=["synced", "without the sync"])
def test_the_rename_is_synced_before_an_old_one_is_removed(
    synced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a loss of power could take the new name and leave the removal of the old."""
    events = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(f"rename {Path(b).name[:10]}"), rename(a, b))[1])
    if not synced:
        monkeypatch.setattr(commit, "sync", lambda path: None)
    saved(tmp_path, 1, 2, 3).rotate(2)
    last = len(events) - events[::-1].index("rename checkpoint") - 1
    sync = [str(tmp_path)] if synced else []
    assert events[last:] == ["rename checkpoint", *sync, "rename .removed-c", *sync]


def both_shards_are_listed(output: Path, delay: Callable[[], Any]) -> bool:
    Together(2).run(lambda ranks: Checkpoints(output, ranks).save("checkpoint-1", 1, shard_of(ranks, delay)))
    manifest = output / "checkpoint-1" / MANIFEST
    return manifest.is_file() and len(json.loads(manifest.read_text())["files"]) == 2


def test_a_slow_process_is_waited_for(tmp_path: Path) -> None:
    assert both_shards_are_listed(tmp_path, lambda: threading.Event().wait(0.3))


def test_without_the_barrier_it_would_not_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoints, "_together", lambda self, action, where: [action()] * self.ranks.world)
    assert not both_shards_are_listed(tmp_path, lambda: threading.Event().wait(0.3))


@pytest.mark.parametrize(("guard", "damage"), [("_differing", "one bit"), ("_read_manifest", "no manifest")])
def test_without_the_check_of_the_manifest_a_broken_one_would_be_loaded(
    guard: str, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1, 2)
    DAMAGE[damage][0](tmp_path / "checkpoint-2")
    assert Checkpoints(tmp_path).newest_whole().path == tmp_path / "checkpoint-1"
    monkeypatch.setattr(commit, guard, lambda folder, entries: {})
    assert Checkpoints(tmp_path).newest_whole().path == tmp_path / "checkpoint-2"


class Killed(BaseException):
    """A kill, as far as it can be played in one process."""


def faults_after_a_kill_at_each_call(output: Path, owner: Any, name: str) -> Iterator[dict[str, str]]:
    """What is not whole after a kill at each call of `owner.name` in a save."""
    for number in range(1, 100):
        folder = output / str(number)
        checkpoints = saved(folder, 1, 2)
        calls = [0]
        with pytest.MonkeyPatch.context() as patch:

            def killing(original: Callable[..., Any], number: int = number, calls: list[int] = calls) -> Any:
                def call(*args: Any, **kwargs: Any) -> Any:
                    calls[0] += 1
                    if calls[0] == number:
                        raise Killed
                    return original(*args, **kwargs)

                return call

            patch.setattr(owner, name, killing(getattr(owner, name)))
            patch.setattr(commit.shutil, "rmtree", lambda *args, **kwargs: None)  # nobody cleans up after a kill
            try:
                checkpoints.save("checkpoint-3", 3, content())
            except Killed:
                found = Checkpoints(folder)
                yield {n: str(found.fault_of(n)) for n in names(folder) if n[0] != "." and found.fault_of(n)}
            else:
                return


def test_a_rename_that_copies_would_show_half_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(faults_after_a_kill_at_each_call(tmp_path / "renamed", os, "rename")) == [{}]
    monkeypatch.setattr(os, "rename", shutil.copytree)
    faults = list(faults_after_a_kill_at_each_call(tmp_path / "copied", shutil, "copyfile"))
    assert [one.keys() for one in faults] == [{"checkpoint-3"}] * (len(FILES) + 1)  # its manifest gives it away


def faults_after_a_kill_in_a_removal(output: Path) -> list[str]:
    """Which checkpoints a kill in the middle of a rotation leaves that are not whole."""
    checkpoints = saved(output, 1, 2, 3)

    def killed(folder: Path, **options: Any) -> None:
        (folder / "model.safetensors").unlink()
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            checkpoints.rotate(2)
    found = Checkpoints(output)
    return [name for name in names(output) if name[0] != "." and found.fault_of(name)]


def test_what_is_removed_in_place_would_leave_half_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert faults_after_a_kill_in_a_removal(tmp_path / "renamed") == []

    def in_place(self: Checkpoints, folders: Sequence[Path]) -> None:
        for folder in folders:
            shutil.rmtree(folder)

    monkeypatch.setattr(Checkpoints, "_remove", in_place)
    assert faults_after_a_kill_in_a_removal(tmp_path / "in place") == ["checkpoint-1"]


@pytest.mark.parametrize(("fewest", "left"), [(commit._FEWEST, "checkpoint-1"), (1, None)])
def test_with_one_checkpoint_damage_would_be_the_end(
    fewest: int, left: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "_FEWEST", fewest)
    saved(tmp_path, 1, 2).rotate(1)
    flip(tmp_path / "checkpoint-2")
    assert Checkpoints(tmp_path).newest_whole().path == (left and tmp_path / left)
