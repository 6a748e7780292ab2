"""What dies in the kill matrix: runs that kill themselves with SIGKILL at a named point of the save of one step.

A point is a place in the production code, reached by wrapping what is called there. None of that code knows of it.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from evs_train import callbacks, checkpoint, commit, disk
from evs_train.commit import MANIFEST, Checkpoints
from evs_train.data.batches import TrainingStream
from evs_train.errors import EvsTrainError, PreemptedError, report
from evs_train.trainer import UptrainTrainer
from evs_train.uptrain import Run
from tests.distributed.order_worker import WatchedRun
from tests.runs import recipe_of

OPTIMIZER = ("optimizer.pt", "optim_states.pt")
Action = Callable[[], None]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


class Now:
    """Whether the process is in the save that it is to die in."""

    name: str = ""
    wanted: str = ""
    rotates = False

    def __bool__(self) -> bool:
        return self.name == self.wanted


NOW = Now()


def around(
    owner: Any, name: str, before: Callable[..., bool] | None = None, after: Callable[..., bool] | None = None
) -> None:
    """Die before or after `owner.name` is called, where the condition holds for its arguments."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before is not None and before(*args, **kwargs):
            die()
        value = original(*args, **kwargs)
        if after is not None and after(*args, **kwargs):
            die()
        return value

    setattr(owner, name, wrapped)


def in_save(*args: Any, **kwargs: Any) -> bool:
    return bool(NOW) and not NOW.rotates


def in_rotation(*args: Any, **kwargs: Any) -> bool:
    return bool(NOW) and NOW.rotates


def nth_in_save(number: int) -> Callable[..., bool]:
    calls = [0]

    def condition(*args: Any, **kwargs: Any) -> bool:
        calls[0] += in_save()
        return in_save() and calls[0] == number

    return condition


def to(name: str | tuple[str, ...]) -> Callable[..., bool]:
    """The first argument is a path that ends so, in the save."""
    return lambda path, *args, **kwargs: in_save() and str(path).endswith(name)


def half_written(owner: Any, name: str, place: int, ending: str | tuple[str, ...]) -> None:
    """Die with half of the file `ending` written, by the call whose argument number `place` is its path."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        value = original(*args, **kwargs)
        if in_save() and str(args[place]).endswith(ending):
            os.truncate(args[place], os.path.getsize(args[place]) // 2)
            die()
        return value

    setattr(owner, name, wrapped)


class At(TrainerCallback):
    """Die when the trainer tells of `event` in step `step`."""

    def __init__(self, event: str, step: int) -> None:
        setattr(self, event, lambda args, state, control, **kwargs: die() if state.global_step == step else None)


def _half_removed() -> None:
    """Die in the middle of removing an old checkpoint."""
    original = shutil.rmtree

    def wrapped(path: Any, *args: Any, **kwargs: Any) -> None:
        if in_rotation() and Path(path).name.startswith(".removed-"):
            min(Path(path).iterdir()).unlink()
            die()
        original(path, *args, **kwargs)

    shutil.rmtree = wrapped  # type: ignore[assignment]


SAVE: dict[str, Action] = {
    "before staging": lambda: around(Checkpoints, "save", before=in_save),
    "staging, no file yet": lambda: around(UptrainTrainer, "save_model", before=in_save),
    "weights written": lambda: around(UptrainTrainer, "save_model", after=in_save),
    "half of the optimizer": lambda: half_written(torch, "save", 1, OPTIMIZER),
    "optimizer written": lambda: around(torch, "save", after=lambda _, path, **k: to(OPTIMIZER)(path)),
    "rates written": lambda: around(torch, "save", after=lambda _, path, **k: to("scheduler.pt")(path)),
    "generators written": lambda: around(Trainer, "_save_rng_state", after=in_save),
    "all written, nothing synced": lambda: around(commit, "sync_all", before=in_save),
    "before the second sync": lambda: around(disk, "sync", before=nth_in_save(2)),
    "after the second sync": lambda: around(disk, "sync", after=nth_in_save(2)),
    "all synced": lambda: around(commit, "sync_all", after=in_save),
    "first file hashed": lambda: around(commit, "entry_of", after=nth_in_save(1)),
    "before the manifest": lambda: around(commit, "write_synced", before=to(MANIFEST)),
    "half of the manifest": lambda: half_written(commit, "write_synced", 0, MANIFEST),
    "after the manifest": lambda: around(commit, "write_synced", after=to(MANIFEST)),
    "before the rename": lambda: around(os, "rename", before=to("")),
    "after the rename": lambda: around(os, "rename", after=to("")),
    "parent synced": lambda: around(commit, "sync", after=nth_in_save(2)),
    "saved": lambda: around(Checkpoints, "save", after=in_save),
}
"""Points of one process, or of the first of several, in the order in which a save comes to them."""

ROTATION: dict[str, Action] = {
    "before rotation": lambda: around(Checkpoints, "rotate", before=in_rotation),
    "before an old one loses its name": lambda: around(os, "rename", before=in_rotation),
    "after an old one lost its name": lambda: around(os, "rename", after=in_rotation),
    "half of an old one removed": _half_removed,
    "after rotation": lambda: around(Checkpoints, "rotate", after=in_rotation),
}

STEP = ("loader", "between backward and step", "between step and save", "in the log", "after the save")
"""Points outside the save, which are reached before it, or after it."""

COMMITTED = {"after the rename", "parent synced", "saved", "after the save", *ROTATION}
"""Points at which the checkpoint of the step is there."""


class Victim(WatchedRun):
    """A run that dies at `point` of step `step`."""

    point: str | None = None
    step = 0

    def build_trainer(self, args: Any = None) -> UptrainTrainer:
        trainer = super().build_trainer(args)
        if self.point == "loader":
            per_step = len(self.stream) // self.schedule.num_steps
            around(TrainingStream, "__getitem__", before=lambda _, number: number // per_step == self.step - 1)
        elif self.point == "in the log":
            around(
                callbacks.JsonlCallback, "on_log", before=lambda _, a, state, *r, **k: state.global_step == self.step
            )
        elif self.point in STEP:
            event = {
                "between backward and step": "on_pre_optimizer_step",
                "between step and save": "on_step_end",
                "after the save": "on_save",
            }[self.point]
            trainer.add_callback(At(event, self.step - (event == "on_pre_optimizer_step")))
        return trainer


def train(
    rank: int, words: list[str], seen: str, point: str | None = None, step: int | str = 0, of_rank: int = 0
) -> int:
    """One start of a run. `step` names the save that the process of rank `of_rank` dies in (or `final`)."""
    if point is not None and rank == of_rank:
        _arm(point, step)
    Path(seen).mkdir(parents=True, exist_ok=True)
    try:
        run = Victim(recipe_of(words))
        run.seen = Path(seen)
        if point in STEP and rank == of_rank:
            run.point, run.step = point, int(step)
        run.train()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
    except EvsTrainError as error:
        return report(error)
    return 0


def told(rank: int, words: list[str], outcome: str, together: bool) -> None:
    """A run of which the second process alone is told to end, after two steps; what each said goes to OUTCOME<rank>.

    `together`: as it is. Otherwise each process goes by what it was told itself.
    """
    if not together:
        judge = UptrainTrainer._judge
        UptrainTrainer._judge = lambda self, batches: judge(self, batches) and self.preemption.requested  # type: ignore[method-assign]

    class Told(TrainerCallback):
        def __init__(self, trainer: UptrainTrainer) -> None:
            self.trainer = trainer

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if rank == 1 and state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                while not self.trainer.preemption.requested:
                    time.sleep(0.01)
                if not together:  # they may wait for each other for ever
                    threading.Timer(3, os._exit, [3]).start()

    class ToldRun(Run):
        def build_trainer(self, args: Any = None) -> UptrainTrainer:
            trainer = super().build_trainer(args)
            trainer.add_callback(Told(trainer))
            return trainer

    try:
        ToldRun(recipe_of(words)).train()
    except PreemptedError as error:
        Path(f"{outcome}{rank}").write_text(error.message, encoding="utf-8")


def _arm(point: str, step: int | str) -> None:
    if point in RESUME:
        RESUME[point]()
        return
    if point in STEP:
        return
    NOW.wanted = step if isinstance(step, str) else f"checkpoint-{step}"
    {**SAVE, **ROTATION}[point]()
    # Outermost, or a death before the save would come before it is known which one it is.
    wrapped_save, wrapped_rotate = Checkpoints.save, Checkpoints.rotate

    def saving(self: Checkpoints, name: str, at: int, write: Any) -> None:
        NOW.name, NOW.rotates = name, False
        wrapped_save(self, name, at, write)

    def rotating(self: Checkpoints, keep: int) -> None:
        NOW.rotates = True
        wrapped_rotate(self, keep)
        NOW.name = ""

    Checkpoints.save, Checkpoints.rotate = saving, rotating  # type: ignore[method-assign]


RESUME: dict[str, Action] = {
    "before cleaning": lambda: around(Checkpoints, "clean", before=lambda *_: True),
    "record half written": lambda: around(disk.os, "replace", before=lambda draft, _: "record" in str(draft)),
    "record written": lambda: around(checkpoint, "replace_text", after=lambda *_: True),
    "log shortened": lambda: around(callbacks, "replace_text", after=lambda *_: True),
}
"""Points of a start, before its first step."""
