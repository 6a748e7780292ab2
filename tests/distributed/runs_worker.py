"""`torchrun --nproc_per_node N -m tests.distributed.runs_worker JOBS`: several runs, one after the other.

JOBS is a JSON file with a list of recipes' arguments. Processes start and import once for all of them, which is what
most of a tiny run's time goes into.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    for words in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        run = WatchedRun(recipe_of(words))
        run.train()
        engine = run.trainer.model_wrapped
        stage = engine.zero_optimization_stage() if isinstance(engine, DeepSpeedEngine) else None
        assert stage == STAGES[run.recipe.deepspeed]  # an earlier run's state would make it another kind of run
    leave_process_group(together=True)
    leave(0)
