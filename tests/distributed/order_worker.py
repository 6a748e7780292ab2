"""Runs that write down what they train on: row, rate and pixels of every draw, as the trainer is handed them.

`torchrun --nproc_per_node N -m tests.distributed.order_worker JOBS` does the jobs of a JSON file one after the other: a
list of `{"words": arguments of a recipe, "seen": folder, "killed_at": step or null}`. Each process writes
`seen/RANK.jsonl`. A run with `killed_at` ends by SIGKILL of all processes as soon as that step's checkpoint is whole.
A job with `"stopped": [folder, step]` goes on from what the run in that folder left at that step.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from evs_train.collate import BatchPlan
from evs_train.data.template import IGNORE_INDEX
from evs_train.errors import leave
from evs_train.trainer import UptrainTrainer
from evs_train.uptrain import Run
from tests.runs import recipe_of


class KillAfterCheckpoint(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.step:
            if dist.is_initialized():
                dist.barrier()  # or a rank may die before the others have written their part
            os.kill(os.getpid(), signal.SIGKILL)


class WatchedRun(Run):
    """A run that writes one line for each row of each micro-batch to `seen`."""

    seen: Path
    killed_at: int | None = None

    def build_trainer(self, args: TrainingArguments | None = None) -> UptrainTrainer:
        trainer = super().build_trainer(args)
        compute_loss = trainer.compute_loss
        file = self.seen / f"{os.environ.get('RANK', '0')}.jsonl"

        def watched(model: Any, inputs: dict[str, Any], *more: Any, **options: Any) -> Any:
            with file.open("a", encoding="utf-8") as lines:
                for line in rows_of(inputs):
                    lines.write(json.dumps({"step": trainer.state.global_step, **line}) + "\n")
            return compute_loss(model, inputs, *more, **options)

        trainer.compute_loss = watched  # type: ignore[method-assign]
        if self.killed_at is not None:
            trainer.add_callback(KillAfterCheckpoint(self.killed_at))
        return trainer


def rows_of(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """What each row of a batch of Qwen3-VL shows: rate, length, checksums of its answer and of each medium's pixels."""
    plan: BatchPlan = inputs["plan"]
    pixels = {
        "video": pieces(inputs["media"], "pixel_values_videos", "video_grid_thw"),
        "image": pieces(inputs["media"], "pixel_values", "image_grid_thw"),
    }
    media: list[list[Any]] = [[] for _ in plan.draws]
    for planned in plan.items:
        kind = planned.item.kind
        media[planned.row].append([kind, planned.pruning_rate, planned.num_retained, checksum(pixels[kind].pop(0))])
    assert not pixels["video"]
    assert not pixels["image"]
    rows = []
    for number, draw in enumerate(plan.draws):
        labels = inputs["labels"][number]
        answer = checksum(labels[labels != IGNORE_INDEX])
        name, rate, length = plan.sample_ids[number], plan.rates[number], plan.num_tokens[number]
        rows.append(
            {"draw": draw, "id": name, "rate": rate, "length": length, "answer": answer, "media": media[number]}
        )
    return rows


def pieces(media: dict[str, torch.Tensor], pixels: str, grids: str) -> list[torch.Tensor]:
    return list(media[pixels].split(media[grids].prod(-1).tolist())) if pixels in media else []


def checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.cpu().contiguous().numpy().tobytes())


def watch(words: list[str], seen: Path, killed_at: int | None = None) -> None:
    """Do a recipe's whole run; see `WatchedRun`."""
    seen.mkdir(parents=True, exist_ok=True)
    run = WatchedRun(recipe_of(words))
    run.seen, run.killed_at = seen, killed_at
    run.train()


def stopped(whole: Path, step: int, to: Path) -> Path:
    """What a run leaves that is killed right behind the checkpoint of `step`; its metrics are of later steps, too."""
    folder = Path(shutil.copytree(whole, to))
    shutil.rmtree(folder / "final")
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.rsplit("-", 1)[1]) > step:
            shutil.rmtree(checkpoint)
    return folder


def seen_in(seen: Path) -> list[dict[str, Any]]:
    """What all processes wrote, step by step in the order of draws."""
    lines = [json.loads(line) for file in seen.glob("*.jsonl") for line in file.read_text().splitlines()]
    return sorted(lines, key=lambda line: (line["step"], line["draw"]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        if "stopped" in job:
            dist.barrier()  # the run that is gone on from is done on all ranks
            if dist.get_rank() == 0:
                whole, step = job["stopped"]
                stopped(Path(whole), step, Path(recipe_of(job["words"]).output_dir))
            dist.barrier()
        watch(job["words"], Path(job["seen"]), job["killed_at"])
    if dist.is_initialized():
        dist.destroy_process_group()
    leave(0)
