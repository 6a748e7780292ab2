"""Group `overhead`: what this package adds to a step at rate 0, against transformers' plain Trainer.

The same model with the same first weights reads the same rows: here by the collator, the hook and `UptrainTrainer`,
there as the processor makes and pads them, by `Trainer`. Both have their batches ready, so what is compared is the
loop: our hook, counts and metrics against the encoder call, scatter and position arithmetic inside the model's forward.
The first losses must agree, or something else than the loop differs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer

from benchmarks.perf.harness import Bench, Column, Group, Row, Size, Spread, alternate, ratio
from benchmarks.perf.live import LiveTrainer
from benchmarks.perf.runs import Plan, ScriptedRun, Step, Workload, silence
from benchmarks.perf.shapes import CPU, QWEN_2B, TOY
from evs_train.data.video import video_metadata
from evs_train.models.base import frames_tensor

WARMUP = 2


PLANS: dict[Size, Plan] = {
    "toy": Plan((Workload(TOY, "full"),), (8, 6), 2),
    "cpu": Plan((Workload(CPU, "full"), Workload(CPU, "lora")), (12, 8), 30),
    "gpu": Plan((Workload(QWEN_2B, "full"), Workload(QWEN_2B, "lora")), (64, 48), 30),
}


class Ready(Dataset[Any]):
    """The same finished batch, `count` times."""

    def __init__(self, batch: Any, count: int) -> None:
        self.batch = batch
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Any:
        return self.batch


def first(items: Sequence[Any]) -> Any:
    """Collate a batch that is ready."""
    return items[0]


def run(bench: Bench) -> list[Row]:
    """A row for each model and tuning."""
    plan = PLANS[bench.size]
    return [_row(work, plan, bench) for work in plan.works]


def _row(work: Workload, plan: Plan, bench: Bench) -> Row:
    bench.say(f"overhead: {work.shape.name}, {work.tuning}")
    num_steps = WARMUP + plan.rounds + 1
    run_ = ScriptedRun(work, [Step(plan.frames, 0.0)] * num_steps, bench)
    ours = run_.build_trainer()
    plain_model = copy.deepcopy(ours.model)
    batch = run_.collator([run_.stream[0]])
    ours.train_dataset, ours.data_collator = Ready(batch, num_steps), first
    args = run_.training_arguments()
    args.per_device_train_batch_size = 1  # an item is a whole batch
    plain = Trainer(
        model=plain_model,
        args=args,
        data_collator=first,
        train_dataset=Ready(plain_batch(run_, batch), num_steps),
    )
    silence(plain)
    live = {"evs_train": LiveTrainer(ours, bench.device), "Trainer": LiveTrainer(plain, bench.device)}
    times = alternate({name: one.step for name, one in live.items()}, plan.rounds, WARMUP)
    for one in live.values():
        one.stop()
    losses = [trainer.state.log_history[0]["loss"] for trainer in (ours, plain)]
    over = ratio(times["evs_train"], times["Trainer"])
    return {
        "model": work.shape.name,
        "tuning": work.tuning,
        "tokens": sum(batch["plan"].num_tokens),
        "evs_train": Spread.of(times["evs_train"]),
        "trainer": Spread.of(times["Trainer"]),
        "overhead": Spread(over.median - 1, over.lower - 1, over.upper - 1, over.count),
        "losses_differ": abs(losses[0] / losses[1] - 1),
    }


def plain_batch(run_: ScriptedRun, ours: dict[str, Any]) -> dict[str, Tensor]:
    """The rows of our batch as one call of the processor makes them, with our pixels and labels.

    The labels fit, since ids are equal; that they are is asserted.
    """
    processor: Any = run_.family.processor
    rows = [run_.order.row(draw) for draw in ours["plan"].draws]
    clips = [run_.blank_clip(row) for row in rows]
    batch = processor(
        text=[processor.apply_chat_template(run_.samples[row].messages, tokenize=False) for row in rows],
        videos=[frames_tensor(clip) for clip in clips],
        video_metadata=[video_metadata(clip) for clip in clips],
        do_sample_frames=False,
        padding=True,
        return_tensors="pt",
    )
    assert torch.equal(batch["input_ids"], ours["input_ids"])
    pixels = ours["media"]["pixel_values_videos"]
    assert batch["pixel_values_videos"].shape == pixels.shape
    return {**batch, "pixel_values_videos": pixels, "labels": ours["labels"]}


COLUMNS = (
    Column("model", "model"),
    Column("tuning", "tuning"),
    Column("tokens", "tokens", ","),
    Column("evs_train", "evs_train, s", ".4f"),
    Column("trainer", "Trainer, s", ".4f"),
    Column("overhead", "overhead", "+.2%"),
    Column("losses_differ", "first losses differ", ".1e"),
)


def draw(axes: Any, rows: Sequence[Row]) -> None:
    """Overhead of each model, with quartiles."""
    for place, row in enumerate(rows):
        over = row["overhead"]
        reach = [[100 * (over["median"] - over["lower"])], [100 * (over["upper"] - over["median"])]]
        axes.errorbar([place], [100 * over["median"]], yerr=reach, fmt="o")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [f"{row['model']},\n{row['tuning']}" for row in rows], fontsize=7)
    axes.set_ylabel("time over the plain Trainer, %")
    axes.margins(x=0.5)


GROUP = Group("a step at rate 0 against the plain Trainer", run, COLUMNS, draw)
