"""Two trainers in one process whose steps alternate: each runs in a thread and goes on by one step when it is told to.

So both meet the same state of the machine at every moment, which runs one after the other do not, and each is driven by
its own unchanged training loop. Seconds are taken in the trainer's thread, from the end of one step to the end of the
next: fetching the batch, forward, backward, optimizer and all bookkeeping, but not the wait for its turn.
Never do two steps run at the same time.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.perf.harness import synchronize


class LiveTrainer(TrainerCallback):
    """A trainer that has been told to train and waits. `step` is a side of `harness.alternate`."""

    def __init__(self, trainer: Any, device: torch.device) -> None:
        self.device = device
        self._trainer = trainer
        self._turn, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._seconds = self._begun = 0.0
        self._stopping = False
        self._error: BaseException | None = None
        trainer.add_callback(self)
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    def step(self) -> float:
        """Let it take one step; returns the seconds. Raises what the training raised."""
        self._turn.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error
        return self._seconds

    def stop(self) -> None:
        """Let it leave its loop, and wait for that."""
        self._stopping = True
        self._turn.release()
        self._thread.join()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._wait(control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        synchronize(self.device)
        self._seconds = time.perf_counter() - self._begun
        self._done.release()
        self._wait(control)

    def _wait(self, control: TrainerControl) -> None:
        self._turn.acquire()
        control.should_training_stop = self._stopping
        self._begun = time.perf_counter()

    def _train(self) -> None:
        try:
            self._trainer.train()
        except Exception as error:  # noqa: BLE001 (whatever it is, `step` raises it where somebody looks)
            self._error = error
            self._done.release()
