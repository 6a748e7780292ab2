"""`torchrun --nproc_per_node N -m tests.distributed.runs_worker FOLDER`: runs, as they are asked for.

`FOLDER/job0`, `FOLDER/job1`, ... are JSON files with a list of recipes' arguments each; a rank that has done those of
one writes `job0.rank0` beside it. Processes start and import once for all of them, which is what most of a tiny run's
time goes into. They end when a run fails, when `FOLDER/end` is there, or when FOLDER is gone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from deepspeed import DeepSpeedEngine
from transformers import TrainingArguments

from evs_train.errors import leave
from evs_train.trainer import UptrainTrainer
from evs_train.uptrain import Run, leave_process_group
from tests.runs import recipe_of

STAGES = {None: None, "zero2": 2, "zero3": 3}


class WatchedRun(Run):
    trainer: UptrainTrainer

    def build_trainer(self, args: TrainingArguments | None = None) -> UptrainTrainer:
        self.trainer = super().build_trainer(args)
        return self.trainer


def do(words: list[str]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # or a run without DeepSpeed would be one with it
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    run = WatchedRun(recipe_of(words))
    run.train()
    engine = run.trainer.model_wrapped
    stage = engine.zero_optimization_stage() if isinstance(engine, DeepSpeedEngine) else None
    assert stage == STAGES[run.recipe.deepspeed]  # an earlier run's state would make it another kind of run


def serve(folder: Path) -> None:
    number = 0
    while folder.is_dir() and not (folder / "end").exists():
        job = folder / f"job{number}"
        if not job.exists():
            time.sleep(0.02)
            continue
        for words in json.loads(job.read_text(encoding="utf-8")):
            do(words)
        (folder / f"job{number}.rank{os.environ['RANK']}").touch()
        number += 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(Path(sys.argv[1]))
    if torch.distributed.is_initialized():
        leave_process_group(together=True)
    leave(0)
