"""Runs that are killed with SIGKILL, again and again, and go on by themselves to the bits of a run that was not.

Each start of a run is a real process, or two of them, and dies at a named point of the save of one step, or at a random
time; the same command is started again. After each death every checkpoint in the folder must be whole, and the next
start must go on from the last one. `make faults` kills at all points in two processes, too, and at 50 random times.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from evs_train.commit import Checkpoints
from tests.distributed.order_worker import seen_in
from tests.faults.nursery import Nursery
from tests.faults.victims import COMMITTED, RESUME, ROTATION, SAVE, STEP
from tests.runs import arguments, metrics

STEPS, KEEP = 8, 2
KILLED = -9
SAME = ("step", "loss", "grad_norm", "learning_rate", "evs/rate", "evs/video_tokens_after", "evs/supervised_tokens")
TRAIN = "tests.faults.victims:train"
LOST = [point for point in (*STEP, *SAVE) if point not in COMMITTED]
"""Points at which the checkpoint of the step is not there yet."""
KEPT = [point for point in (*STEP, *SAVE) if point in COMMITTED]
SELDOM = (
    "between step and save",
    "staging, no file yet",
    "rates written",
    "generators written",
    "before the second sync",
    "after the second sync",
    "first file hashed",
    "after the manifest",
)
"""Points beside others that are tried each time: with one process, only `make faults` kills there."""
FIRST_SAVE, LATER_SAVE, SAVE_WITH_ROTATION = 1, 2, 3
Kill = tuple[str, int | str, int]
"""Point, step of the save, rank."""


@dataclass
class Life:
    """A run through all its starts."""

    nursery: Nursery
    words: list[str]
    folder: Path
    world: int = 1
    starts: list[list[dict[str, Any]]] = field(default_factory=list)  # what each of them trained on

    @property
    def output(self) -> Path:
        return self.folder / "run"

    def start(self, kill: Kill | None = None, kill_after: float | None = None) -> list[int]:
        """Exit codes of one start. It goes on where the ones before it came to, and leaves only whole checkpoints."""
        seen = self.folder / f"seen{len(self.starts)}"
        whole = self.newest()
        point = {} if kill is None else dict(zip(("point", "step", "of_rank"), kill, strict=True))
        codes = self.nursery.run(
            TRAIN, world=self.world, kill_after=kill_after, words=self.words, seen=str(seen), **point
        )
        self.starts.append(seen_in(seen))
        steps = sorted({line["step"] for line in self.starts[-1]})
        assert steps == list(range(whole, whole + len(steps))), "it did not go on from the newest checkpoint"
        checkpoints = Checkpoints(self.output)
        for folder in self.output.glob("checkpoint-*"):
            assert checkpoints.fault_of(folder.name) is None, (kill, folder.name)
        reached = whole + len(steps)
        assert reached - 1 <= self.newest() <= reached, f"{reached - self.newest()} save intervals were lost"
        assert len(list(self.output.glob("checkpoint-*"))) >= min(KEEP, self.newest())
        return codes

    def newest(self) -> int:
        found = Checkpoints(self.output).newest_whole().path
        return 0 if found is None else int(found.name.rsplit("-", 1)[1])

    def die(self, kill: Kill) -> None:
        codes = self.start(kill)
        assert codes[kill[2]] == KILLED, (kill, codes)

    def finish(self) -> None:
        assert self.start() == [0] * self.world

    def lines(self) -> list[dict[str, Any]]:
        return [{name: line[name] for name in SAME} for line in metrics(self.output)]

    def weights(self) -> dict[str, str]:
        files = (self.output / "final").glob("*.safetensors")
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    def assert_same_as(self, other: Life) -> None:
        """The same samples, rates, losses and weights, to the last bit, in every start and in the end."""
        assert self.lines() == other.lines()
        assert self.weights() == other.weights()
        (whole,) = other.starts
        for seen in self.starts:
            assert seen == [line for line in whole if line["step"] in {of["step"] for of in seen}][: len(seen)]
        last = {line["step"]: number for number, seen in enumerate(self.starts) for line in seen}
        assert sorted(last) == sorted({line["step"] for line in whole})
        assert Checkpoints(self.output).fault_of("final") is None
        names = {path.name for path in self.output.iterdir()}
        assert not {name for name in names if name.startswith(".") or name.endswith(".draft")}, names


@pytest.fixture
def life(nurse: Nursery, tiny_checkpoint: Callable[[str], Path], world: Path, tmp_path: Path) -> Callable[..., Life]:
    """A run that was not started yet."""

    def make(name: str = "life", processes: int = 1, **options: Any) -> Life:
        settings: dict[str, Any] = {
            "evs__rate": {"kind": "uniform", "min": 0.0, "max": 0.9},
            "data__num_frames": 4,
            "train__steps": STEPS,
            "train__batch_size": 2 // processes,
            "train__save_every": 1,
            "train__keep_checkpoints": KEEP,
            "train__resume": "auto",
            **options,
        }
        folder = tmp_path / name
        words = arguments(tiny_checkpoint("qwen3_vl"), world, folder / "run", **settings)
        return Life(nurse, words, folder, processes)

    return make


UNINTERRUPTED: dict[str, Life] = {}


@pytest.fixture
def uninterrupted(life: Callable[..., Life]) -> Callable[..., Life]:
    """A run of the same options that is not killed, made once."""

    def make(**options: Any) -> Life:
        key = json.dumps(options, sort_keys=True)
        if key not in UNINTERRUPTED:
            one = life("uninterrupted", **options)
            one.finish()
            UNINTERRUPTED[key] = one
        return UNINTERRUPTED[key]

    return make


def test_the_points_are_enough() -> None:
    assert len(LOST) - len(SELDOM) + len(KEPT) >= 14
    assert not set(LOST) & set(KEPT)


@pytest.mark.parametrize("seldom", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("step", [FIRST_SAVE, LATER_SAVE, SAVE_WITH_ROTATION])
def test_a_kill_before_the_checkpoint_is_there(
    step: int, seldom: bool, life: Callable[..., Life], uninterrupted: Callable[..., Life]
) -> None:
    """One run dies at every point of the same save, one after the other: each time it comes no further."""
    one = life()
    for point in [point for point in LOST if (point in SELDOM) == seldom]:
        one.die((point, step, 0))
        assert one.newest() in (step - 1, step - 2), point  # the loader is one step ahead
    one.finish()
    one.assert_same_as(uninterrupted())


@pytest.mark.parametrize("first", range(len(KEPT)))
def test_a_kill_after_the_checkpoint_is_there(
    first: int, life: Callable[..., Life], uninterrupted: Callable[..., Life]
) -> None:
    """At the first save, a later one and one with rotation; each point comes to each of them."""
    one = life()
    for step in (FIRST_SAVE, LATER_SAVE, SAVE_WITH_ROTATION):
        one.die((KEPT[(first + step) % len(KEPT)], step, 0))
        assert one.newest() == step
    one.finish()
    one.assert_same_as(uninterrupted())


def test_a_kill_in_rotation(life: Callable[..., Life], uninterrupted: Callable[..., Life]) -> None:
    one = life()
    for step, point in enumerate(ROTATION, SAVE_WITH_ROTATION):
        one.die((point, step, 0))
        assert one.newest() == step
    one.finish()
    one.assert_same_as(uninterrupted())


def test_a_kill_while_the_final_weights_are_written(
    life: Callable[..., Life], uninterrupted: Callable[..., Life]
) -> None:
    one = life()
    for point in ("before staging", "weights written", "before the rename", "after the rename"):
        one.die((point, "final", 0))
        assert (one.output / "final").exists() == (point == "after the rename")
    one.finish()
    one.assert_same_as(uninterrupted())


def test_a_kill_at_the_start_of_a_resumed_run(life: Callable[..., Life], uninterrupted: Callable[..., Life]) -> None:
    one = life()
    one.die(("weights written", LATER_SAVE, 0))
    for point in RESUME:
        one.die((point, 0, 0))
        assert one.newest() == LATER_SAVE - 1
    one.finish()
    one.assert_same_as(uninterrupted())


def random_kills(one: Life, number: int) -> None:
    """Kills at random times of as much of the run as is left."""
    draw = random.Random(time.time_ns())
    seconds = 0.0
    for _ in range(number):
        began = time.monotonic()
        codes = one.start(kill_after=draw.uniform(0.05, seconds) if seconds else None)
        if seconds == 0.0 or codes == [0] * one.world:
            seconds = seconds or time.monotonic() - began
            shutil.rmtree(one.folder)
            one.starts.clear()
    one.finish()


def test_kills_at_random_times(life: Callable[..., Life], uninterrupted: Callable[..., Life]) -> None:
    one = life()
    random_kills(one, 7)
    one.assert_same_as(uninterrupted())


OF_TWO: Sequence[Kill] = (
    ("weights written", 1, 0),
    ("generators written", 1, 1),
    ("before the rename", 1, 0),
    ("after the rename", 1, 0),
    ("between backward and step", 2, 1),
    ("half of the optimizer", 2, 0),
    ("all written, nothing synced", 2, 1),
    ("first file hashed", 3, 1),
    ("half of the manifest", 3, 0),
    ("after an old one lost its name", 3, 0),
    ("before the manifest", 4, 0),
)


def test_a_kill_of_one_of_two_processes(life: Callable[..., Life], uninterrupted: Callable[..., Life]) -> None:
    """The other one is killed thereupon, as torchrun would."""
    one = life(processes=2)
    for kill in OF_TWO:
        one.die(kill)
    one.finish()
    one.assert_same_as(uninterrupted(processes=2))


OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"tuning__method": "lora"},
    "zero2": {"processes": 2, "deepspeed": "zero2"},
    "zero3": {"processes": 2, "deepspeed": "zero3", "tuning__method": "lora"},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_kill_of_adapters_and_of_shards(
    kind: str, life: Callable[..., Life], uninterrupted: Callable[..., Life]
) -> None:
    options = {**OPTIONS[kind], "train__steps": 3}
    one = life(**options)
    one.die(("half of the optimizer", LATER_SAVE, one.world - 1))
    one.die(("after an old one lost its name", SAVE_WITH_ROTATION, 0))
    one.finish()
    one.assert_same_as(uninterrupted(**options))


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("processes", [1, 2])
def test_fifty_kills_at_random_times(
    processes: int, life: Callable[..., Life], uninterrupted: Callable[..., Life]
) -> None:
    one = life(processes=processes)
    random_kills(one, 50)
    one.assert_same_as(uninterrupted(processes=processes))


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("step", [FIRST_SAVE, LATER_SAVE, SAVE_WITH_ROTATION])
def test_every_kill_of_one_of_two_processes(
    step: int, rank: int, life: Callable[..., Life], uninterrupted: Callable[..., Life]
) -> None:
    one = life(processes=2)
    for point in LOST:
        if rank == 0 or point in OF_EACH_RANK:
            one.die((point, step, rank))
    for place, point in enumerate(KEPT):
        if rank == 0:
            one.die((point, step + place, 0))
    one.finish()
    one.assert_same_as(uninterrupted(processes=2))


OF_EACH_RANK = {
    *(point for point in STEP if point != "in the log"),
    "before staging",
    "generators written",
    "all written, nothing synced",
    "before the second sync",
    "after the second sync",
    "all synced",
    "first file hashed",
}
"""Points that processes other than the first one come to, too."""


@pytest.mark.parametrize("together", [True, False], ids=["together", "each for itself"])
def test_one_of_two_is_told_to_end(together: bool, nurse: Nursery, life: Callable[..., Life], tmp_path: Path) -> None:
    """The other one hears of it by a sum over both. Without the sum they part, and nothing is saved."""
    run = life(processes=2, train__save_every=None)
    told: dict[str, Any] = {"words": run.words, "outcome": str(tmp_path / "outcome"), "together": together}

    def both_save() -> None:
        assert nurse.run("tests.faults.victims:told", world=2, **told) == [0, 0]
        said = {(tmp_path / f"outcome{rank}").read_text() for rank in range(2)}
        assert said == {f"told to end by a signal; step 2 is saved in {run.output}"}

    if together:
        both_save()
    else:
        with pytest.raises(AssertionError):
            both_save()
    assert [path.name for path in run.output.glob("checkpoint-*")] == ["checkpoint-2"] * together
