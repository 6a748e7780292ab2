"""What a run shows and records besides weights: a short line and a JSON line per log, and pictures of kept patches.

Only the first process writes. A failure to write is an error: metrics are part of the result.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from evs_train.collate import PlannedItem
from evs_train.config import Part
from evs_train.disk import replace_text, whole_lines
from evs_train.models.base import Family
from evs_train.models.tuning import recompute_only
from evs_train.prune import EvsHook
from evs_train.tracking import Tracker
from evs_train.visualize import kept_figure, save_png


class ProgressLine(ProgressCallback):
    """transformers' progress bar with one short line per log, where the original prints every metric."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.write(
                f"step {state.global_step:>6}  loss {logs['loss']:.4f}  rate {logs['evs/rate']:.2f}  "
                f"video tokens {logs['evs/video_tokens_before']:,.0f} -> {logs['evs/video_tokens_after']:,.0f}  "
                f"{logs['speed/tokens_per_second']:,.0f} tokens/s"
            )


class RecomputeOnly(TrainerCallback):
    """Lets only some parts recompute their activations: the trainer switches it on in all of them before it begins."""

    def __init__(self, family: Family, parts: Sequence[Part]) -> None:
        self.family, self.parts = family, parts

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        recompute_only(model, self.family, self.parts)


class JsonlCallback(TrainerCallback):
    """Appends every log to `path` as one JSON object with its step: the twin of what goes to W&B.

    A resumed run goes on after its checkpoint: lines of later steps, which will be trained again, are dropped, and one
    that a kill cut short. JSON has no NaN or infinity, so these are written as the strings "nan", "inf" and "-inf".
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.path.exists():
            kept = [line for line in whole_lines(self.path) if json.loads(line)["step"] <= state.global_step]
            replace_text(self.path, "".join(kept))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log after the last step whatever `log_every` is, or its steps would be missing from the totals."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and logs:
            values = {name: value if math.isfinite(value) else str(value) for name, value in logs.items()}
            line = {"step": state.global_step, "time": round(time.time(), 3), **values}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")


class TrackingCallback(TrainerCallback):
    """Passes every log on to W&B, under the names that it has in `metrics.jsonl`."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and logs:
            self.tracker.log(logs, state.global_step)


class PictureCallback(TrainerCallback):
    """Draws which patches EVS kept in the videos whose plan carries frames; to `folder`, and to W&B."""

    def __init__(self, hook: EvsHook, folder: Path, tracker: Tracker) -> None:
        self.hook = hook
        self.folder = folder
        self.tracker = tracker

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        kept, self.hook.kept = self.hook.kept, []
        if not (state.is_world_process_zero and kept):
            return
        paths = []
        for number, (planned, selected) in enumerate(kept):
            path = self.folder / f"step{state.global_step:06d}_{number}.png"
            save_png(draw_kept(planned, selected), path)
            paths.append(path)
        self.tracker.pictures("evs/kept", paths, state.global_step)


def draw_kept(planned: PlannedItem, selected: torch.Tensor) -> Any:
    """Figure (PIL) of one pruned video: a frame of each unit with the patches of the `selected` (K,) tokens clear."""
    if planned.frames is None:
        raise ValueError("the plan carries no frames of this video")
    item = planned.item
    mask = torch.zeros(item.num_tokens, dtype=torch.bool)
    mask[selected.cpu()] = True
    return kept_figure(
        planned.frames,
        mask.view(item.num_units, item.height, item.width).numpy(),
        frames_per_unit=1,
        pruning_rate=planned.pruning_rate,
    )
