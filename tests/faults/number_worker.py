"""Runs with losses and gradients that are not finite: `torchrun ... -m tests.faults.number_worker JOBS`.

JOBS is a JSON file: a list of `{"words": arguments of a recipe, "seen": folder, "faults": [...]}`, done one after the
other; a fault is `{"step": S, "rank": R, "micro_batch": M, "kind": ...}`. Each process writes `seen/RANK.jsonl`: after
each step, checksums of its weights and of the optimizer's moments, its learning rates, and whether all that is finite;
and for each fault the samples that it struck. A job with `"unchecked": true` lacks what makes DeepSpeed look at norms.
Leaves with the exit code of `launch/uptrain.py`.
"""

from __future__ import annotations

import json
import math
import os
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from evs_train import beginning, uptrain
from evs_train.collate import BatchPlan
from evs_train.errors import leave
from evs_train.trainer import UptrainTrainer
from launch.uptrain import main
from tests.runs import recipe_of

RANK = int(os.environ.get("RANK", "0"))


class Witness(TrainerCallback):
    """Writes down what a step may change."""

    def __init__(self, trainer: UptrainTrainer, write: Any) -> None:
        self.trainer, self.write = trainer, write

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        weights = [p.ds_tensor if hasattr(p, "ds_tensor") else p for p in self.trainer.model.parameters()]
        optimizer: Any = self.trainer.optimizer
        while hasattr(optimizer, "optimizer"):  # accelerate's, DeepSpeed's, torch's
            optimizer = optimizer.optimizer
        weights += [weight for group in optimizer.param_groups for weight in group["params"]]  # DeepSpeed's own
        moments = [moment for of_weight in optimizer.state.values() for moment in of_weight.values()]
        self.write(
            step=state.global_step,
            weights=checksum(weights),
            moments=checksum(moments),
            rates=[group["lr"] for group in optimizer.param_groups],
            finite=all(bool(tensor.isfinite().all()) for tensor in weights + moments),
        )


def checksum(tensors: list[Tensor]) -> int:
    sum_so_far = 0
    for tensor in tensors:
        flat = tensor.detach().cpu().reshape(-1).view(torch.uint8)  # NumPy has no bfloat16
        sum_so_far = zlib.crc32(flat.numpy().tobytes(), sum_so_far)
    return sum_so_far


def strike(fault: dict[str, Any], loss: Tensor, logits: Tensor) -> Tensor:
    """`infinite` leaves the gradient finite, and `gradient` the loss."""
    if fault["kind"] == "gradient":
        logits.register_hook(lambda gradient: gradient * math.nan)
        return loss
    return loss + math.inf if fault["kind"] == "infinite" else loss * math.nan


def faulty(faults: list[dict[str, Any]], seen: Path) -> type[uptrain.Run]:
    """A run that these faults strike."""
    mine = {(fault["step"], fault["micro_batch"]): fault for fault in faults if fault["rank"] == RANK}
    seen.mkdir(parents=True, exist_ok=True)

    def write(**line: Any) -> None:
        with (seen / f"{RANK}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    class FaultyRun(uptrain.Run):
        def build_trainer(self, args: TrainingArguments | None = None) -> UptrainTrainer:
            trainer = super().build_trainer(args)
            loss_of = trainer._loss_of
            micro_batches: Counter[int] = Counter()

            def struck(plan: BatchPlan, outputs: Any, name: str | None) -> Tensor:
                loss = loss_of(plan, outputs, name)
                fault = mine.get((plan.step, micro_batches[plan.step]))
                micro_batches[plan.step] += 1
                if fault is None:
                    return loss
                write(fault=fault, samples=plan.sample_ids)
                return strike(fault, loss, outputs["logits"])

            trainer._loss_of = struck  # type: ignore[method-assign]
            trainer.add_callback(Witness(trainer, write))
            return trainer

    return FaultyRun


if __name__ == "__main__":
    torch.set_num_threads(1)
    *first, last = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for job in first:
        with pytest.MonkeyPatch.context() as patch:
            if job.get("unchecked"):
                patch.setattr(beginning, "have_deepspeed_check", lambda optimizer: None)
            faulty(job["faults"], Path(job["seen"]))(recipe_of(job["words"])).train()
    uptrain.Run = faulty(last["faults"], Path(last["seen"]))  # type: ignore[misc]
    leave(main(last["words"]))
