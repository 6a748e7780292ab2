"""What a Trainer writes: checkpoints that are whole or not there, and no file that nothing reads.

Invariant: transformers writes a checkpoint into a staging folder, and `commit.py` gives it its name when all processes
have written; only whole ones are counted when old ones are removed. Cost: what `commit.py` hashes and syncs.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from evs_train.commit import Checkpoints
from evs_train.redaction import redact


class SavingTrainer(Trainer):
    """Trainer whose checkpoints are committed to `checkpoints`, of which the newest `keep_checkpoints` stay."""

    def __init__(self, *, checkpoints: Checkpoints, keep_checkpoints: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.checkpoints, self.keep_checkpoints = checkpoints, keep_checkpoints
        self._staging: Path | None = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with warnings.catch_warnings():
            # PEFT looks for the base by the name that adapters are saved with, in which the home folder is `~`.
            warnings.filterwarnings("ignore", "Could not find a config file in")
            super()._save(output_dir, state_dict)
        # A pickle of all arguments, paths and tokens among them, that nothing reads again.
        (Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        write, step = super()._save_checkpoint, self.state.global_step

        def write_into(staging: Path) -> None:
            self._staging = staging
            if self.is_deepspeed_enabled:  # whose files hold its whole configuration, for tools that nothing here uses
                self.deepspeed.config = redact(self.deepspeed.config)
            write(model, trial)

        try:
            self.checkpoints.save(f"checkpoint-{step}", step, write_into)
        finally:
            self._staging = None
        self.checkpoints.rotate(self.keep_checkpoints)

    def _get_output_dir(self, trial: Any) -> str:
        # Where transformers makes the folder `checkpoint-N`.
        return self.args.output_dir if self._staging is None else str(self._staging)
