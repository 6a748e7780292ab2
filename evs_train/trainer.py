"""The training loop: transformers' Trainer with a fixed draw order, an exact token-weighted loss, and EVS metrics.

What differs from the plain Trainer, and why:
- the loader reads the micro-batches of `data/schedule.py` in their order, so rows and rates do not depend on the number
  of processes;
- the loss is the sum over supervised tokens divided by their number over all ranks and micro-batches. (transformers'
  Qwen classes say `accepts_loss_kwargs = False`, which would average averages; their forward does take the count.)
- a step may make further passes over its media (`objective`), whose losses are summed before the one backward;
- learning rates by part, and metrics that say what pruning did;
- bad samples are counted over all ranks before a step's batches are used, so that all ranks end in the same step.

Invariant: one optimizer step's loss and gradient are the same for any split of its draws over ranks and micro-batches,
up to rounding. Cost over the plain Trainer: what `tally.py` counts, and one all-reduce of three numbers per step that
keeps count of bad samples over all ranks (where transformers has waited for the device already, to move the batch).
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from evs_train.collate import BatchPlan
from evs_train.config import ObjectiveSection, OptimSection
from evs_train.data.quarantine import BadSample, Found, NoneLeftError, Quarantine
from evs_train.models.tuning import parameter_groups
from evs_train.objectives import supervised_places, teacher_kl
from evs_train.prune import EvsHook
from evs_train.tally import BACKENDS, Tally


class _AttachHook(TrainerCallback):
    """Hooks the model after DeepSpeed has, when training begins.

    DeepSpeed's hook turns on the gathering of weights that a module reads of another one, as GLM's vision tower does
    (ZeRO-3). The tower runs in our hook, so that one must come later.
    """

    def __init__(self, hook: EvsHook) -> None:
        self.hook = hook

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.hook.attach(model)


class _BeginQuarantine(TrainerCallback):
    """Counts of bad samples go on from the step that a resumed run begins with."""

    def __init__(self, quarantine: Quarantine) -> None:
        self.quarantine = quarantine

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.quarantine.begin(state.global_step, writes=state.is_world_process_zero)


class UptrainTrainer(Trainer):
    """Trainer of a model whose batches are pruned by `hook`. See the module's docstring for what differs."""

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        *,
        hook: EvsHook,
        optim: OptimSection,
        objective: ObjectiveSection,
        quarantine: Quarantine,
        args: TrainingArguments,
        **kwargs: Any,
    ) -> None:
        super().__init__(args=args, **kwargs)
        self.quarantine = quarantine
        self.model_accepts_loss_kwargs = True
        self.hook = hook
        self.optim_section = optim
        self.objective = objective
        names = [f"pass_{name}" for name in (*objective.further_passes, "drawn")] if objective.further_passes else []
        self.tally = Tally([*names, "teacher_kl"] if objective.kind == "teacher" else names)
        self.losses: list[float] = []
        self.seconds = 0.0
        self._last_log = 0.0  # 0: the clock starts with the first batch, not with loading
        hook.autocast = self.accelerator.autocast
        self.add_callback(_AttachHook(hook))
        self.add_callback(_BeginQuarantine(quarantine))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)

    def get_train_dataloader(self) -> DataLoader[Any]:
        # An item of the data set is a micro-batch, whatever number of rows it has.
        loader: DataLoader[Any] = self._get_dataloader(
            self.train_dataset, "Training", batch_size=1, sampler_fn=self._get_train_sampler, is_training=True
        )
        return loader

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = list(parameter_groups(model, self.hook.family, self.optim_section))
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        self._last_log = self._last_log or time.perf_counter()
        with self.hook.stopwatch.section("data", device=False):
            batches = list(islice(epoch_iterator, num_batches))
            self._judge(batches)
            return super().get_batch_samples(iter(batches), num_batches, device)

    def _judge(self, batches: Sequence[dict[str, Any]]) -> None:
        """Count the bad samples of one step over all ranks, and end the run where there are too many.

        Raises:
            BudgetError: on every rank in the same step.
            EvsTrainError: `data.on_error` is `raise` and this rank met a bad sample; torchrun ends the others.
        """
        met: list[tuple[Sequence[BadSample], str | None]] = []  # of each draw, and what it shows instead
        none_left = False
        for batch in batches:
            if "error" in batch:
                if not isinstance(batch["error"], NoneLeftError):
                    raise batch["error"]
                none_left = True
                met += batch["bad"]
            else:
                met += zip(batch["plan"].bad, batch["plan"].sample_ids, strict=True)
        lines = [line for bad, shown in met for line in self.quarantine.lines_of(bad, shown)]
        # A process alone has nothing to reduce, and waits for no device.
        device = self.args.device if self.accelerator.num_processes > 1 else torch.device("cpu")
        mine = torch.tensor([len(met), len(lines), none_left], dtype=torch.int64, device=device)
        num_draws, num_lines, none_left = self.accelerator.reduce(mine, "sum").tolist()
        everyones = gather_object(lines) if num_lines else []
        self.quarantine.add(Found(num_draws, everyones, none_left), writes=self.is_world_process_zero())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        plan: BatchPlan = inputs["plan"]
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.hook.family.averages_loss and num_items_in_batch is not None:
            loss = loss * sum(plan.num_supervised) / num_items_in_batch
        with torch.no_grad():
            drawn = self.tally.add(plan, outputs["logits"], self.hook.labels)
        if self.objective.further_passes:
            assert num_items_in_batch is not None  # a training step has a count
            self.tally.add_sum("pass_drawn", drawn)
            further = self._teacher_loss if self.objective.kind == "teacher" else self._sandwich_loss
            loss = further(plan, loss, outputs["logits"], self.accelerator.num_processes / num_items_in_batch)
            self.hook.passes = []  # their logits need not wait for the next step
        return (loss, outputs) if return_outputs else loss

    def _teacher_loss(self, plan: BatchPlan, loss: Tensor, logits: Tensor, share: Tensor | float) -> Tensor:
        """`loss` and the weighted KL. `share`: what one token counts, times the ranks averaged over."""
        (teacher,) = self.hook.passes
        places, targets = supervised_places(self.hook.labels, sum(plan.num_supervised))
        expected = teacher.outputs["logits"][0]  # (S, V)
        kl = teacher_kl(logits.flatten(0, 1)[places], expected, self.objective.temperature)
        self.tally.add_computed(teacher.plan)
        self.tally.add_sum("pass_teacher", F.cross_entropy(expected.float(), targets, reduction="sum"))
        self.tally.add_sum("teacher_kl", kl)
        return loss + self.objective.teacher_weight * share * kl

    def _sandwich_loss(self, plan: BatchPlan, loss: Tensor, logits: Tensor, share: Tensor | float) -> Tensor:
        """The mean of `loss` and the further passes' losses."""
        for name, one in zip(self.objective.further_passes, self.hook.passes, strict=True):
            with torch.no_grad():
                self.tally.add_sum(f"pass_{name}", self.tally.add_pass(one.plan, one.outputs["logits"], one.labels))
            mean = self.hook.family.averages_loss  # of the micro-batch, instead of its part of the step's loss
            scale = share * sum(plan.num_supervised) if mean else self.accelerator.num_processes
            loss = loss + one.outputs["loss"] * scale
        return loss / (1 + len(self.hook.passes))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self._pruning_metrics()}
            self.losses.append(logs["loss"])
        super().log(logs, start_time)

    def _pruning_metrics(self) -> dict[str, float]:
        """Metrics since the last log, over all ranks (times: of this rank). Called on every rank."""
        now = time.perf_counter()
        elapsed, self._last_log = now - self._last_log, now
        self.seconds += elapsed
        sums = self.tally.collect(lambda t: self.accelerator.reduce(t, "sum"), self.args.device)
        times = self.hook.stopwatch.collect()
        metrics = {name: value for name, value in sums.items() if name.startswith("loss/")}
        metrics |= {
            "evs/rate": sums["rate"] / max(sums["rows"], 1),
            "evs/rate_applied": sums["rate_applied"] / max(sums["video_rows"], 1),
            "evs/video_tokens_before": sums["video_tokens_before"],
            "evs/video_tokens_after": sums["video_tokens_after"],
            "evs/supervised_tokens": sums["supervised"],
            "evs/padding": sums["padding"] / max(sums["padding"] + sums["tokens"], 1),
            "data/shortened": sums["shortened"],
            **{f"data/decoded/{backend}": sums[f"decoded/{backend}"] for backend in BACKENDS},
            "speed/tokens_per_second": sums["tokens"] / elapsed,
            "speed/samples_per_second": sums["rows"] / elapsed,
            **{f"time/{name}": seconds for name, seconds in times.items()},
            "time/rest": elapsed - sum(times.values()),
            "memory/peak_gib": _peak_memory() / 2**30,
            **self.quarantine.metrics(),
        }
        if self.hook.cache is not None:
            metrics |= self.hook.cache.metrics(lambda t: self.accelerator.reduce(t, "sum"), self.args.device)
        if self.lr_scheduler is not None and self.optimizer is not None:
            for group in self.optimizer.param_groups:
                metrics[f"lr/{group['name'].removesuffix('_no_decay')}"] = float(group["lr"])
        return metrics


def _peak_memory() -> int:
    """Bytes: the device's peak allocation, or this process's largest resident size on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
